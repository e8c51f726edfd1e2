"""`m3llm generate`: one question, conversations, sampling and user errors."""

import json

import pytest
from PIL import Image

from internvl_chat.cli import main as m3llm
from internvl_chat.inference.engine import Engine, ask
from internvl_chat.inference.sampling import Sampling


@pytest.fixture(scope="module")
def figures(sample_data):
    return sorted((sample_data / "images").glob("*_fig*.jpg"))[:2]


@pytest.fixture
def generate(tiny_model, capfd):
    """Return a function that runs `generate` with the small model and returns exit code and output."""

    def run(*argv, model=tiny_model):
        capfd.readouterr()
        code = m3llm(["generate", "--model", str(model), "--device", "cpu", "--max_new_tokens", "8",
                      *map(str, argv)])  # fmt: skip
        return code, capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def engine(tiny_model):
    return Engine.from_checkpoint(tiny_model, device="cpu")


def answers(engine, questions, images=(), **options):
    """Return the answers to the questions of a conversation."""
    prompt, result = ask(questions[0], images, options.pop("system", None)), []
    for question in [*questions[1:], None]:
        result += engine.answer([prompt], max_new_tokens=8, **options)
        prompt = prompt.then(result[-1], question)
    return result


def test_one_answer(generate, engine, figures):
    images = [Image.open(figure).convert("RGB") for figure in figures]
    argv = [flag for figure in figures for flag in ("--image", figure)]
    code, written = generate(*argv, "Which?")
    assert (code, written.out) == (0, answers(engine, ["Which?"], images)[0] + "\n")
    code, written = generate(*argv, "Is <image> like <image>?", "--json")
    [row] = map(json.loads, written.out.splitlines())
    assert row == {
        "question": "Is <image> like <image>?",
        "images": [str(figure) for figure in figures],
        "answer": answers(engine, ["Is <image> like <image>?"], images)[0],
    }


# Long enough to change the answers of a model with random weights.
SYSTEM = "Fig-7: 0123456789 zebra " * 20


def test_conversation_with_a_system_text(generate, engine, figures):
    images = [Image.open(figures[0]).convert("RGB")]
    questions = ["Which panel? " * 40, "Why?", "And the other?"]
    code, written = generate("--image", figures[0], "--system", SYSTEM, *questions)
    expected = answers(engine, questions, images, system=SYSTEM)
    assert (code, written.out) == (0, "".join(f"{answer}\n" for answer in expected))
    assert expected != answers(engine, questions, images)
    assert expected[1] != answers(engine, ["Why?"], images, system=SYSTEM)[0]


def test_sampled_answers(generate, engine):
    code, written = generate("What?", "--temperature", 1.5, "--top_p", 0.9, "--seed", 4)
    expected = answers(engine, ["What?"], sampling=Sampling(1.5, 0.9, 4))
    assert (code, written.out) == (0, expected[0] + "\n")


@pytest.mark.parametrize(
    ("argv", "code", "messages"),
    [
        ([], 2, ["the following arguments are required: question"]),
        ([" "], 2, ["empty question"]),
        (["What?", "--seed", "1"], 2, ["--top_p and --seed require --temperature"]),
        (["What?", "--temperature", "-1", "--top_p", "3"], 2, ["temperature -1.0 must", "top_p 3.0 must"]),
        (["What?", "--device", "gpu"], 2, ["--device gpu: unknown"]),
        (["--image", "/no/a.jpg", "--image", "/no/b.jpg", "--image", "BROKEN", "What?"], 1,
         ["3 problems", "/no/a.jpg does not exist", "/no/b.jpg does not exist", "broken.jpg cannot be"]),
        (["--image", "FIGURE", "Is <image> as <image>?"], 1, ["2 <image> placeholders, but 1 image"]),
        (["--image", "FIGURE", "Is <image 1> red?"], 1, ["unsupported placeholder '<image 1>'; use <image>"]),
        (["--max_dynamic_patch", "0", "What?"], 2, ["must be at least 1"]),
    ],
)  # fmt: skip
def test_user_errors(generate, argv, code, messages, figures, tmp_path, capfd):
    (tmp_path / "broken.jpg").write_bytes(figures[0].read_bytes()[:500])
    paths = {"FIGURE": figures[0], "BROKEN": tmp_path / "broken.jpg"}
    try:
        exit_code, written = generate(*(paths.get(text, text) for text in argv))
    except SystemExit as stop:
        exit_code, written = stop.code, capfd.readouterr()
    assert exit_code == code
    for message in messages:
        assert message in written.err
    assert not written.out


def test_content_that_is_not_shown(generate, tmp_path):
    image = Image.new("RGB", (60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "pages.tif", save_all=True, append_images=[image, image])
    image.save(tmp_path / "turned.jpg", exif=exif)
    argv = ("--image", tmp_path / "pages.tif", "--image", tmp_path / "turned.jpg", "Which?")
    _, written = generate(*argv)
    assert "pages.tif: only the first of 3 pages or frames is used" in written.err
    assert "turned.jpg: EXIF orientation 6 is not applied" in written.err
    _, written = generate(*argv, "--exif_transpose", "True")
    assert "EXIF" not in written.err


@pytest.mark.parametrize(
    ("name", "message"),
    [("no.png", "no.png does not exist"), ("https://example.org/a.png", "is a URL (https://)"),
     ("PAGES.TIF", "the folder contains pages.tif")],
)  # fmt: skip
def test_image_that_is_no_file(generate, tmp_path, monkeypatch, name, message):
    Image.new("RGB", (60, 30)).save(tmp_path / "pages.tif")
    monkeypatch.chdir(tmp_path)
    code, written = generate("--image", name, "Which?")
    assert code == 1
    assert message in written.err


def test_warnings_about_questions(generate):
    _, written = generate("What is <img>?", "And <image 2>?")
    assert "'<img>' is tokenized as a control token" in written.err
    assert "'<image 2>' is treated as text" in written.err
    _, written = generate("What", "is", "it?")
    assert "the 3 words are treated as separate questions" in written.err
    _, written = generate("What?", "Why?", "--escape_control_tokens", "True")
    assert "questions" not in written.err and "token" not in written.err
