"""`m3llm chat` with lines from standard input and in a terminal: answers, commands, interrupts."""

import io
import json
import signal
import stat
import sys
from pathlib import Path

import pytest
from PIL import Image
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from internvl_chat.cli import main as m3llm
from internvl_chat.commands.inference import chat as command
from internvl_chat.commands.inference.line_editor import ChatCompleter, line_editor
from internvl_chat.inference.engine import Engine, ask
from internvl_chat.inference.sampling import Sampling
from internvl_chat.inference.scheduler import Completion
from internvl_chat.utils.paths import state_folder

LENGTH = 8


@pytest.fixture(scope="module")
def engine(tiny_model) -> Engine:
    return Engine.from_checkpoint(tiny_model, device="cpu")


@pytest.fixture
def figure(sample_data) -> Path:
    return min((sample_data / "images").glob("*_fig1.jpg"))


@pytest.fixture
def run(tiny_model, capfd, monkeypatch, tmp_path):
    """Return a function that runs the command in a separate folder, and returns exit code and output."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)

    def run(*argv, model=tiny_model):
        capfd.readouterr()
        options = ["--device", "cpu", "--max_new_tokens", str(LENGTH)]
        code = m3llm(["chat", str(model), *options, *map(str, argv)])
        return code, capfd.readouterr()

    return run


@pytest.fixture
def piped(run, monkeypatch):
    """Return a function that runs the command with lines from standard input."""

    def piped(text, *argv):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        return run(*argv)

    return piped


@pytest.fixture
def typed(run, monkeypatch):
    """Return a function that runs the command in a terminal with typed keys."""

    def typed(keys, *argv):
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            keyboard.send_text(keys)
            return run(*argv)

    return typed


def answers(engine, questions, images=(), system=None, **options):
    """Return the answers to the questions of a conversation."""
    prompt, found = ask(questions[0], images, system), []
    for question in [*questions[1:], None]:
        found += engine.answer([prompt], max_new_tokens=LENGTH, **options)
        prompt = prompt.then(found[-1], question)
    return found


def test_lines(piped, engine, figure):
    image = Image.open(figure)
    code, written = piped(f"/image '{figure}'\nWhat?\n\nWhy?\n/reset\nWhy?\n")
    expected = [*answers(engine, ["What?", "Why?"], [image]), *answers(engine, ["Why?"])]
    assert (code, written.out) == (0, "".join(f"{answer}\n" for answer in expected))
    assert f"Fig-0: {figure.name}" in written.err and "new conversation" in written.err


def test_options(piped, engine, figure):
    image = Image.open(figure)
    code, written = piped(
        "What?\n", "--image", figure, "--system", "Be brief.", "--temperature", 1.5, "--seed", 4
    )
    [expected] = answers(engine, ["What?"], [image], "Be brief.", sampling=Sampling(1.5, 1.0, 4))
    assert (code, written.out) == (0, f"{expected}\n")


def test_lines_after_exit_are_not_read(piped):
    assert piped("/exit\nWhat?\n")[1].out == ""


@pytest.mark.parametrize(
    ("text", "argv", "code", "message"),
    [
        ("/image none.png\nWhat?\n", [], 1, "none.png does not exist"),
        ("/picture\nWhat?\n", [], 2, "unknown command '/picture'"),
        ("Is <image> red?\nWhat?\n", [], 1, "1 <image> placeholder, but 0 images"),
        ("word " * 30000, [], 1, "max_seq_length"),
        ("What?\n", ["--image", "none.png"], 1, "none.png does not exist"),
        ("What?\n", ["--seed", "1"], 2, "--top_p and --seed require --temperature"),
    ],
)
def test_the_first_error_ends_piped_input(piped, text, argv, code, message):
    found, written = piped(text, *argv)
    assert (found, written.out) == (code, "")
    assert message in written.err


def test_input_that_is_not_text(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    code, written = run()
    assert code == 1
    assert "standard input is not text" in written.err


def test_warnings_about_questions(piped):
    assert "'<|im_end|>' is tokenized as a control token" in piped("What is <|im_end|>?\n")[1].err


def test_terminal(typed, engine, figure):
    image = Image.open(figure)
    code, written = typed(f"/image {figure}\rWhat?\rWhy?\r/save chat.jsonl\r\x04")
    assert code == 0
    expected = answers(engine, ["What?", "Why?"], [image])
    lines = written.out.splitlines()
    assert "/help lists the commands" in lines[0] and lines[1].startswith(f"Fig-0: {figure.name}")
    assert "\n".join(lines[2:]) == "\n".join([*expected, "appended to chat.jsonl"])
    encoded = engine.encode(ask("What?", [image]))
    assert (
        f"[prompt: {len(encoded.input_ids)} tokens, {4 * encoded.num_tiles} of them for {encoded.num_tiles} "
        f"tiles; answer: {LENGTH} tokens; cut off, see --max_new_tokens]"
    ) in written.err
    saved = json.loads(Path("chat.jsonl").read_text())
    assert [message["value"] for message in saved["conversations"]] == [
        "<image>\nWhat?", expected[0], "Why?", expected[1],
    ]  # fmt: skip


def test_errors_do_not_end_the_chat(typed, engine):
    code, written = typed("/image none.png\r/picture\rIs <image> red?\rWhat?\r/exit\r")
    assert code == 0
    assert written.out.splitlines()[1:] == answers(engine, ["What?"])[0].splitlines()
    for message in ("none.png does not exist", "unknown command", "1 <image> placeholder"):
        assert message in written.err
    assert "Traceback" not in written.err


@pytest.fixture(autouse=True)
def _interrupts():
    """Handle interrupts as in a terminal; shells start background processes with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupt_after(monkeypatch):
    """Return a function that makes Ctrl+C arrive after a number of pieces of the first answer."""

    def arrange(pieces):
        left = [pieces]

        def echo(text="", **options):
            print(text, flush=True, end=options.get("end", "\n"), file=options.get("stream"))
            if options.get("end") == "":
                left[0] -= 1
                if left[0] == 0:
                    signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(command, "echo", echo)

    return arrange


def test_an_interrupt_stops_the_answer(typed, interrupt_after):
    interrupt_after(3)
    code, written = typed("What?\r/save chat.jsonl\r\x04", "--max_new_tokens", 4000)
    assert code == 0
    assert "; stopped]" in written.err
    [_, answer] = json.loads(Path("chat.jsonl").read_text())["conversations"]
    assert 0 < len(answer["value"]) < 100 and answer["value"] in written.out


def test_an_interrupt_before_the_answer_discards_the_question(typed, monkeypatch, figure, engine):
    iterate = Completion.__iter__

    def interrupted(completion):
        monkeypatch.setattr(Completion, "__iter__", iterate)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Completion, "__iter__", interrupted)
    _, written = typed(f"/image {figure}\rWhat?\rWhy?\r\x04")
    assert "[question discarded]" in written.err
    assert answers(engine, ["Why?"], [Image.open(figure)])[0] in written.out


def test_an_interrupt_clears_the_line(typed, engine):
    code, written = typed("Where\x03What?\r\x04")
    assert (code, written.out.splitlines()[1:]) == (0, answers(engine, ["What?"])[0].splitlines())


def test_an_interrupt_ends_piped_input(piped, interrupt_after):
    interrupt_after(1)
    assert piped("What?\nWhy?\n", "--max_new_tokens", 4000)[0] == 130


def test_a_failure_of_the_model_ends_the_chat(typed, monkeypatch):
    monkeypatch.setattr(Engine, "embed_tiles", lambda *_: 1 / 0)
    code, written = typed("What?\r")
    assert code == 1
    assert "m3llm: the model has failed" in written.err


def test_the_history_is_private_and_kept(typed):
    typed("What?\rWhy?\r\x04")
    file = state_folder() / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(line_editor().history.load_history_strings()) == ["Why?", "What?"]


def test_a_chat_without_a_history(typed, tmp_path):
    (tmp_path / "state").write_text("a file")
    code, written = typed("/help\r\x04")
    assert code == 0
    assert "the chat history is not saved" in written.err


def test_a_terminal_requires_prompt_toolkit(typed, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, written = typed("")
    assert code == 2
    assert "m3llm chat requires prompt_toolkit: pip install 'm3llm[ui]'" in written.err


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    for name in ("figure one.png", 'figure "two".png', "other"):
        (tmp_path / name).touch()
    (tmp_path / "my folder").mkdir()
    (tmp_path / "my folder/it's.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("/i", ["/image"]),
        ("/s", ["/system", "/save"]),
        ("What", []),
        ("What /i", []),
        ("/system figure", []),
        ("/image fig", ['/image figure\\ \\"two\\".png', "/image figure\\ one.png"]),
        ("/image 'figure o", ["/image 'figure one.png"]),
        ('/image "figure', ['/image "figure \\"two\\".png', '/image "figure one.png']),
        ("/image other ./o", ["/image other ./other"]),
        ("/image my\\ folder/", ["/image my\\ folder/it\\'s.png"]),
        ('/image "my folder/', ["/image \"my folder/it's.png"]),
        ("/image ~/o", ["/image ~/other"]),
        ("/save oth", ["/save other"]),
        ("/image none", []),
    ],
)
def test_completion(files, line, completed):
    found = ChatCompleter().get_completions(Document(line), CompleteEvent())
    results = [line[: len(line) + each.start_position] + each.text for each in found]
    assert results == completed
