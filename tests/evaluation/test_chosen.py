"""What --eval stands for: its grammar, the hooks it makes, and mistakes in it."""

import fcntl
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from data_prep.tokenizer import RANKS_SHA256
from megaresid.data.manifest import Tokenizer
from megaresid.errors import UserError
from megaresid.evaluation import chosen, perplexity, tasks
from megaresid.evaluation.chosen import Entry, check_tokenizer, hooks, measures, parse
from megaresid.evaluation.first_alone import first_alone


def test_entries_are_names_and_when():
    text = " validation@500  wikitext2,lambada@1000\tarc_easy,my.hooks:norms@end "
    assert parse(text) == [
        Entry(("validation",), 500),
        Entry(("wikitext2", "lambada"), 1000),
        Entry(("arc_easy", "my.hooks:norms"), None),
    ]
    assert parse("") == parse(" ") == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("validation", "--eval validation: it does not say when"),
        ("arc_easy, piqa@end", "--eval arc_easy,: it does not say when.*no blanks within an entry"),
        ("validation@0", "'0' is not a number of steps from 1, nor 'end'"),
        ("validation@-5", "'-5' is not a number"),
        ("validation@1.5", "'1.5' is not a number"),
        ("validation@1e3", "'1e3' is not a number"),
        ("validation@²", "'²' is not a number"),
        ("validation@", "'' is not a number"),
        ("validation@END", "'END' is not a number"),
        ("@100", "'' is no name"),
        ("arc_easy,,piqa@100", "'' is no name"),
        ("a:b:c@100", "'a:b:c' is no name"),
        (":f@100", "':f' is no name"),
        ("m:@100", "'m:' is no name"),
        ("a@b@100", "'a@b' is no name"),
        ("validation@100 piqa,validation@end", "validation is named 2 times"),
    ],
)
def test_mistakes_in_the_grammar(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


@pytest.fixture
def made(monkeypatch):
    """The arguments that the other parts' factories were called with; each makes its name a measure."""
    calls = []

    def maker(name):
        def make(*arguments):
            calls.append((name, *arguments))
            return f"measure of {name}"

        return make

    for module, name in ((perplexity, "wikitext2"), (perplexity, "lambada"), (tasks, "tasks")):
        monkeypatch.setattr(module, name, maker(name))
    monkeypatch.setattr(chosen, "_encoding", lambda: "encoding")
    return calls


def test_all_tasks_of_an_entry_are_one_hook_and_validation_comes_first(made, tmp_path):
    entries = parse("arc_easy,wikitext2,piqa@7 lambada@end validation@3 hellaswag@end")
    found = hooks(entries, tmp_path, lambda: "measure of validation")
    assert [(hook.name, hook.interval, hook.measure) for hook in found] == [
        ("validation", 3, "measure of validation"),
        ("wikitext2", 7, "measure of wikitext2"),
        ("arc_easy,piqa", 7, "measure of tasks"),
        ("lambada", None, "measure of lambada"),
        ("hellaswag", None, "measure of tasks"),
    ]
    assert made == [
        ("wikitext2", tmp_path, "encoding"),
        ("tasks", ["arc_easy", "piqa"], tmp_path, "encoding", None),
        ("lambada", tmp_path, "encoding"),
        ("tasks", ["hellaswag"], tmp_path, "encoding", None),
    ]


def test_a_limit_reaches_the_tasks_and_nothing_else(made):
    assert list(measures(["lambada", "piqa"], None, None, limit=5)) == ["lambada", "piqa"]
    assert made == [("lambada", None, "encoding"), ("tasks", ["piqa"], None, "encoding", 5)]


def test_a_name_of_ours_that_is_mistyped_is_not_only_an_unknown_task(monkeypatch):
    def no_task(names, *_):
        raise UserError(f"unknown task {names[0]!r}")

    monkeypatch.setattr(tasks, "tasks", no_task)
    monkeypatch.setattr(chosen, "_encoding", lambda: "encoding")
    with pytest.raises(UserError, match="unknown task 'validaton' .or is 'validation' meant by 'validaton'"):
        measures(["validaton"], None, None)
    with pytest.raises(UserError, match="^unknown task 'boolq'$"):
        measures(["boolq"], None, None)


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A module of the user's."""
    (tmp_path / "users_hooks.py").write_text(
        "def norms(engine):\n    return {'norm': 1.0}\n\n"
        "def with_default(engine, power=2):\n    return {}\n\n"
        "def two(engine, other):\n    return {}\n\n"
        "NUMBER = 3\n"
    )
    (tmp_path / "users_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("users_hooks", None)


def test_a_users_function_is_a_measure(users):
    found = measures(["users_hooks:norms", "users_hooks:with_default"], None, None)
    assert {name: measure(None) for name, measure in found.items()} == {
        "users_hooks:norms": {"norm": 1.0},
        "users_hooks:with_default": {},
    }


@pytest.mark.parametrize(
    "name, message",
    [
        ("users_hooks:norm", "cannot import it: .*no attribute 'norm'; is its folder on PYTHONPATH"),
        ("no_such_module:f", "cannot import it: No module named"),
        ("users_broken:f", "cannot import it: ZeroDivisionError"),
        ("users_hooks:two", "not a function of the engine alone: missing a required argument: 'other'"),
        ("users_hooks:NUMBER", "not a function of the engine alone"),
    ],
)
def test_a_users_function_that_cannot_be_one(users, name, message):
    with pytest.raises(UserError, match=f"--eval {name}: {message}"):
        measures([name], None, None)


def test_a_folder_of_texts_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--eval-data .*/missing: no such folder"):
        measures(["wikitext2"], tmp_path / "missing", None)


def test_texts_are_for_models_of_gpt2s_tokens_alone():
    sizes = {"vocab_size": 50257, "end_of_text": 50256}
    other = Tokenizer(name="other", sha256="0" * 64, **sizes)
    check_tokenizer(["wikitext2"], Tokenizer(name="gpt2", sha256=RANKS_SHA256, **sizes), Path("d"))
    check_tokenizer(["validation", "my:own"], other, Path("d"))
    for name in ("wikitext2", "lambada", "arc_easy"):
        with pytest.raises(UserError, match=f"--eval {name}: .* data folder d by another .other."):
            check_tokenizer(["validation", name], other, Path("d"))


def test_the_grammar_waits_for_no_torch():
    code = "import json, sys, megaresid.evaluation.chosen as c; c.parse('a@1'); print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "lm_eval", "tiktoken"} & set(json.loads(done.stdout))


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """As another process holds it that has come first."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with first_alone():
        (path,) = tmp_path.iterdir()
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file


def test_who_comes_second_waits_for_the_first_and_the_later_ones_go_together(lock, monkeypatch):
    waiting, inside, done = threading.Semaphore(0), threading.Barrier(3), []
    flock = fcntl.flock

    def watched(file, operation):
        if operation == fcntl.LOCK_SH:
            waiting.release()
        flock(file, operation)

    def enter():
        with first_alone():
            inside.wait(timeout=30)  # with the other one and the test: none of them has the block for itself
            done.append(True)

    monkeypatch.setattr(fcntl, "flock", watched)
    threads = [threading.Thread(target=enter, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert all(waiting.acquire(timeout=30) for _ in threads)
    assert inside.n_waiting == 0
    flock(lock, fcntl.LOCK_UN)
    inside.wait(timeout=30)
    for thread in threads:
        thread.join(timeout=30)
    assert done == [True, True]


def test_what_needs_no_download_waits_for_nobody(lock):
    with first_alone(False):
        pass
