"""What a converted checkpoint says about itself to people: a part of its README.md."""

from collections import Counter

from prenorm_jax.interop.plan import Plan


def card(plan: Plan, fold: bool) -> str:
    """The fragment, in Markdown."""
    converted = [module for module, norm in plan.norms.items() if norm["converted"]]
    lines = [
        "## Pre-RMSNorm",
        "",
        f"The weights of this {plan.model_type} model were recentered by prenorm_jax (arXiv 2305.14858): what writes to its main branch "
        "(the residual stream) has zero mean along its features. It is the same function as before when it runs with LayerNorm, in the "
        "code that it was made for, and the same function again when RMSNorm, with the same eps, weight and bias, takes the place of "
        f"{len(converted)} of its {len(plan.norms)} LayerNorms. `prenorm.json` lists them.",
        "",
    ]
    if fold:
        lines += [
            "The norms' weights and biases were folded into the linear maps behind them, where those have room for them; what such a norm "
            "returns (the last of hidden_states among it) is without them.",
            "",
        ]
    for reason, count in Counter(norm["reason"] for norm in plan.norms.values() if norm["reason"]).items():
        lines += [f"- {count} LayerNorm{'s' * (count > 1)} stay{'s' * (count == 1)}: {reason}."]
    for module, reason in plan.recentered.items():
        lines += [f"- With RMSNorm, subtract from the input of `{module}` its mean over the features, once: {reason}."]
    if plan.untied:
        lines += [
            f"- `{plan.untied[0]}` is a table of its own now (`tie_word_embeddings: false`): only the embedding is recentered."
        ]
    raw = ", ".join(plan.architecture.raw)
    lines += [
        f"- Outputs that are the main branch as it is ({raw}) have another mean than before.",
        "- In training, dropout on the output of a branch gives the main branch a mean again; for RMSNorm switch it off.",
        "",
    ]
    return "\n".join(lines)
