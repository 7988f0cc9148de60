"""A GPT-2 checkpoint with its tokenizer, imported and evaluated on a text: the perplexity is the reference library's, in every form."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
import torchvision_names  # noqa: F401

# isort: split
import transformers
from tokenizers import ByteLevelBPETokenizer

ROOT = pathlib.Path(__file__).parent.parent.parent
TEXT = (ROOT / "README.md").read_text()[:3000]
CONTEXT = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder of the checkpoint, token ids of TEXT, the model)"""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder, torch.tensor(tokenizer.encode(TEXT).ids), model


def run(*arguments):
    """A command of this package, in a process of its own as a user has it."""
    found = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_perplexity_of_a_text_is_the_originals_in_every_form(checkpoint, tmp_path):
    folder, ids, model = checkpoint
    windows = (len(ids) - 1) // CONTEXT
    inputs, targets = ids[: windows * CONTEXT].view(windows, CONTEXT), ids[1 : windows * CONTEXT + 1]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets).item()

    (tmp_path / "text.txt").write_text(TEXT)
    run("-m", "prenorm_jax.interop", "import", folder, tmp_path / "imported")
    config = f"--config=configs/pretrained.py:{tmp_path / 'imported'}"
    run("eval.py", config, f"--config.data.root={tmp_path / 'text.txt'}", f"--workdir={tmp_path / 'run'}")
    report = json.loads((tmp_path / "run" / "equivalence.json").read_text())
    assert len(report["answers"]) == 4
    for form in report["answers"].values():
        assert form["loss"] == pytest.approx(loss, rel=1e-5)
        assert form["same_predictions"] == form["predictions"] == windows * CONTEXT
