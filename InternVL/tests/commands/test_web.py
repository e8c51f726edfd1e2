"""`m3llm web`: options, names of the models, an interrupt, and user errors."""

import json
import shutil

import httpx
import pytest
from browser import served

from internvl_chat.cli import main as m3llm
from internvl_chat.utils.web import address


@pytest.fixture
def run(monkeypatch):
    """Return a function that runs the command, with another function instead of the server."""

    def run(serve, *argv):
        monkeypatch.setattr("internvl_chat.utils.web.run_app", serve)
        assert m3llm(["web", *map(str, argv), "--port", "0", "--device", "cpu"]) == 0

    return run


def test_the_application_answers_until_an_interrupt(run, tiny_model):
    asked = {
        "questions": [{"text": "What?"}],
        "images": [],
        "answers": [],
        "model": 0,
        "max_new_tokens": 4000,
    }

    def serve(app, opened, on_interrupt):
        assert address(opened).startswith("http://127.0.0.1:")
        with (
            served(app) as url,
            httpx.stream("POST", f"{url}/api/answer", json=asked, timeout=300) as response,
        ):
            lines = response.iter_lines()
            assert json.loads(next(lines))["promptTokens"]
            on_interrupt()
            *_, last = lines
        assert json.loads(last) == {"error": "the prompt was not answered: shutting down"}

    run(serve, tiny_model)


@pytest.fixture
def models(tiny_model, tmp_path):
    for name in ("a/merged", "b/merged", "b/other"):
        shutil.copytree(tiny_model, tmp_path / name)
    return tmp_path


def test_names_of_models(run, models):
    shown = []

    def serve(app, opened, on_interrupt):
        with served(app) as url:
            page = httpx.get(url).text
        shown.append(json.loads(page.partition('id="config">')[2].partition("</script>")[0])["models"])

    run(serve, models / "a/merged", models / "b/other")
    same = [str(models / "a/merged"), str(models / "b/merged")]
    run(serve, *same)
    assert shown == [["merged", "other"], same]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["TINY", "TINY/"], 2, "both models are TINY; give two different ones to compare them"),
        (["/no/model"], 1, "no such model folder"),
        (["TINY", "/no/model"], 1, "no such model folder"),
        (["TINY", "--host", "256.0.0.1"], 2, "--host 256.0.0.1 --port 8020"),
    ],
)
def test_user_errors(tiny_model, capsys, argv, code, message):
    def filled(text):
        return text.replace("TINY", str(tiny_model))

    assert m3llm(["web", *map(filled, argv)]) == code
    assert filled(message) in capsys.readouterr().err


def test_missing_package(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else name)
    assert m3llm(["web", str(tiny_model)]) == 2
    assert capsys.readouterr().err == "m3llm: m3llm web requires fastapi: pip install 'm3llm[ui]'\n"
