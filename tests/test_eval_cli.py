"""eval.py as a user runs it: a checkpoint of train.py in, the equivalence report and generated text out; bad input is one line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # on one Python

ROOT = Path(__file__).parent.parent


def command(*words, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "gpt"
    done = command(
        "train.py",
        "--config=configs/quickstart.py:gpt",
        f"--workdir={folder}",
        "--config.compare.enabled=False",
        "--config.train.steps=3",
        "--config.optimizer.warmup_steps=1",
        "--config.train.eval_examples=16",
        "--config.model.width=32",
        "--config.model.depth=2",
        "--config.model.context=32",
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_report_holds_and_is_written(workdir):
    done = command("eval.py", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Everything holds." in done.stdout
    report = json.loads((workdir / "equivalence.json").read_text())
    assert set(report["errors"]) == {"float64", "float32", "bfloat16"}
    assert report["failures"] == []
    assert max(row["logits_max"] for row in report["errors"]["float64"].values()) <= report["tolerances"]["float64"]
    assert report["control"]["logits_max"] >= report["tolerances"]["negative_control"]
    assert (workdir / "equivalence.md").read_text() in done.stdout.replace("\n\nwritten", "\nwritten")
    assert (workdir / "equivalence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_gpt_continues_a_prompt(workdir):
    done = command(
        "eval.py", f"--workdir={workdir}", "--prompt=def f", "--new_tokens=8", "--temperature=1", "--top_k=5"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f")
    assert len(done.stdout) > len("def f\n")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--workdir"),
        (["--workdir=nowhere"], "no checkpoint in"),
        (["--workdir=nowhere", "--forms=post_ln"], "pre_crmsnorm-reflect"),
        (["--workdir=nowhere", "--prompt=def", "--forms=pre_ln"], "--forms: got it with --prompt"),
        (["--workdir=nowhere", "--temperature=0.8"], "--temperature: got it without --prompt"),
        (["--config=nowhere.py", "--best"], "--best: got it with --config"),
        (["--workdir=nowhere", "--new_tokens=many"], "invalid int value: 'many'"),
    ],
)
def test_bad_flags_are_one_line(flags, says, tmp_path):
    done = command(ROOT / "eval.py", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_text_longer_than_the_context_is_refused(workdir):
    done = command("eval.py", f"--workdir={workdir}", "--prompt=def f", "--new_tokens=1000")
    assert done.returncode == 2
    assert "at most the context, 32" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("eval_py", ROOT / "eval.py")
    eval_py = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(eval_py)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_py.evaluation, "evaluate_checkpoint", interrupted)
    monkeypatch.setattr(eval_py, "use_compilation_cache", lambda: None)
    assert eval_py.main(["--workdir=anywhere"]) == 130
    assert capsys.readouterr().err == "eval.py: interrupted\n"
