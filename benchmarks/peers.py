"""Our training step beside PyTorch's: the same work, on the same card, in one command.

python benchmarks/peers.py [--works vit_b,vit_s,gpt_small] [--rounds 5] [--out FILE] [--tiny] [--backend inductor]

| work | theirs | ours |
|---|---|---|
| vit_b | timm vit_base_patch16_224, batch 256 | ViT-B/16 |
| vit_s | timm vit_small_patch16_224, batch 512 | ViT-S/16 |
| gpt_small | transformers GPT2LMHeadModel with SDPA, 124M, 16 x 1024 tokens | GPT Small |

Both sides: bfloat16 arithmetic on float32 parameters, cross entropy (label smoothing 0.1 on images), gradients clipped to a norm of 1,
AdamW, one batch that stays on the device. Theirs: torch.compile, autocast, SDPA, fused AdamW, no dropout; the vocabulary is padded to
50304 on both sides. Ours: the step that train.py trains with, in native coordinates. Of a ViT's last block it computes what the class
token needs, which is what the loss depends on; timm computes the block for every token.

Each side is a process of its own, so that no framework holds the other's memory; both stay alive and take turns, A B A B, a window of
steps each with one wait at its end, so that what the card does besides meets both. A ratio is taken between windows of one round.
--tiny: a few layers of width 32, to see on any machine that everything runs; its figures mean nothing.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

WORKS: dict[str, dict[str, Any]] = {
    "vit_b": {"family": "vit", "size": "B/16", "batch": 256, "peer": "vit_base_patch16_224"},
    "vit_s": {"family": "vit", "size": "S/16", "batch": 512, "peer": "vit_small_patch16_224"},
    "gpt_small": {"family": "gpt", "size": "small", "batch": 16, "peer": "GPT2LMHeadModel"},
}
FORMS = ("pre_ln", "pre_rmsnorm", "pre_crmsnorm-reflect", "pre_crmsnorm-drop")
TINY = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 128}
Steps = Callable[[int], float]  # how many -> seconds of one


# --- the parent: starts both sides of a work, and gives them their turns


class Side:
    """A process that answers each line "STEPS" with a line of JSON: seconds of one step, by name."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        command = [sys.executable, str(pathlib.Path(__file__)), "--side", name, *arguments]
        self.command = " ".join(command)
        # JAX would otherwise take most of the card's memory at once, and leave the other side none.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )
        self.hello = self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; whatever else is printed is passed on. Raises RuntimeError where the process ended."""
        for line in self.process.stdout or ():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
            print(line, end="", file=sys.stderr)
        self.close()
        raise RuntimeError(f"{self.command} ended with status {self.process.returncode}")

    def take(self, steps: int) -> dict[str, float]:
        """Seconds of one of `steps` steps, by name."""
        assert self.process.stdin
        print(steps, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """Ends the process and waits for it, so that its memory is free."""
        self.process.communicate()


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Times every work and returns what the JSON file holds."""
    result: dict[str, Any] = {"peers": [], "command": " ".join(sys.argv), "xla_flags": os.environ.get("XLA_FLAGS", "")}
    for name in given.works.split(","):
        passed = ["--works", name, "--forms", given.forms, "--backend", given.backend]
        sides: list[Side] = []
        try:
            for side in ("theirs", "ours"):
                sides.append(Side(side, passed + ["--tiny"] * given.tiny))
                print(f"{name}: {side} ready, {sides[-1].hello['seconds']:.0f} s", flush=True)
            result["device"] = sides[1].hello["device"]
            result["versions"] = {
                **result.get("versions", {}),
                **sides[1].hello["versions"],
                **sides[0].hello["versions"],
            }
            windows: list[dict[str, list[float]]] = [{}, {}]
            for _ in range(given.rounds):
                for side, seconds in zip(sides, windows, strict=True):
                    for row, value in side.take(given.steps).items():
                        seconds.setdefault(row, []).append(value)
        finally:
            for side in sides:
                side.close()
        ((peer, theirs),) = windows[0].items()
        result["peers"].append(
            {
                "work": sides[1].hello["work"],
                "steps": given.steps,
                "theirs": {"name": peer, "windows_s": theirs},
                "ours": {form: {"windows_s": seconds} for form, seconds in windows[1].items()},
            }
        )
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


# --- the sides


def serve(
    prepare: Callable[[argparse.Namespace], tuple[dict[str, Any], dict[str, Steps]]], given: argparse.Namespace
) -> None:
    """Says hello once everything is compiled and warm, then takes as many steps as each line asks for."""
    start = time.perf_counter()
    hello, rows = prepare(given)
    for steps in rows.values():
        steps(3 if given.tiny else 10)
    print(json.dumps({**hello, "seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        print(json.dumps({name: steps(int(line)) for name, steps in rows.items()}), flush=True)


def ours(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Steps]]:
    """The training step of train.py, a row a form."""
    import concurrent.futures
    import dataclasses

    import jax

    from prenorm_jax import models
    from prenorm_jax.measure import step_time, works

    row = WORKS[given.works]
    work = works.work(row["family"], row["size"], row["batch"], "training", "native")
    if given.tiny:
        vit = isinstance(work.model, models.ViTConfig)
        small = {**TINY, "image_size": 32} if vit else {**TINY, "context": 16, "vocab_size": 256}
        work = dataclasses.replace(work, name="tiny", model=dataclasses.replace(work.model, **small), batch=2)
    forms = given.forms.split(",")
    with concurrent.futures.ThreadPoolExecutor(len(forms)) as pool:
        cases = dict(zip(forms, pool.map(lambda name: work.case(step_time.TIMED[name]), forms), strict=True))
    hello = {
        "work": work.key,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
        "compile_s": {name: case.compile_seconds for name, case in cases.items()},
    }
    return hello, {name: case.run for name, case in cases.items()}


def theirs(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Steps]]:
    """The training step of a torch model: compiled, autocast, fused AdamW."""
    import importlib.metadata

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    row = WORKS[given.works]
    library, model, inputs, targets, loss_of = (_timm if row["family"] == "vit" else _gpt2)(row, given.tiny, device)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    parameters = list(model.parameters())

    def forward(inputs: Any, targets: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return loss_of(model, inputs, targets)

    compiled = torch.compile(forward, backend=given.backend)

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            loss = compiled(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        assert torch.isfinite(loss)
        return (time.perf_counter() - start) / count

    found = {"torch": torch.__version__, library: importlib.metadata.version(library)}
    return {"versions": found}, {f"{library} {row['peer']}": steps}


def _timm(row: dict[str, Any], tiny: bool, device: str) -> tuple[str, Any, Any, Any, Callable[..., Any]]:
    import timm
    import torch

    small = {"embed_dim": TINY["width"], "depth": TINY["depth"], "num_heads": TINY["heads"], "img_size": 32}
    model = timm.create_model(row["peer"], pretrained=False, **(small if tiny else {}))
    batch, side = (2, 32) if tiny else (row["batch"], 224)
    inputs = torch.randn(batch, 3, side, side, device=device)
    targets = torch.randint(1000, (batch,), device=device)

    def loss_of(model: Any, inputs: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(inputs), targets, label_smoothing=0.1)

    return "timm", model, inputs, targets, loss_of


def _gpt2(row: dict[str, Any], tiny: bool, device: str) -> tuple[str, Any, Any, Any, Callable[..., Any]]:
    import torch
    from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

    def causal_sdpa(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return y.transpose(1, 2).contiguous(), None

    # Under torch.compile before 2.14 the library's own "sdpa" writes the causal mask out, and loses the flash kernel by it. An
    # implementation of one's own gets no mask: the peer is to be as fast as it can be.
    AttentionInterface.register("causal_sdpa", causal_sdpa)
    small = {"n_embd": TINY["width"], "n_layer": TINY["depth"], "n_head": TINY["heads"]}
    batch, length, vocabulary = (2, 16, 256) if tiny else (row["batch"], 1024, 50304)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=length, use_cache=False, **dropout, **(small if tiny else {})
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation="causal_sdpa")
    tokens = torch.randint(min(vocabulary, 50257), (batch, length + 1), device=device)

    def loss_of(model: Any, inputs: Any, targets: Any) -> Any:
        logits = model(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return "transformers", model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), loss_of


def main(arguments: list[str]) -> int:
    """Exit status: 0; 1 where a side could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(WORKS), help="comma-separated; default: all")
    parser.add_argument("--forms", default="pre_ln,pre_rmsnorm,pre_crmsnorm-drop", help=f"ours, of {', '.join(FORMS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--out", type=pathlib.Path, help="JSON, written after each work")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if unknown := [f"--works: {name}" for name in given.works.split(",") if name not in WORKS] + [
        f"--forms: {name}" for name in given.forms.split(",") if name not in FORMS
    ]:
        parser.error(f"{unknown[0]}; allowed: {', '.join(WORKS)} and {', '.join(FORMS)}")
    if given.side:
        serve(ours if given.side == "ours" else theirs, given)
        return 0
    try:
        result = compare(given)
    except (RuntimeError, OSError) as error:
        print(f"peers.py: {error}", file=sys.stderr)
        return 1
    from prenorm_jax.measure.study import peers_table

    print(peers_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
