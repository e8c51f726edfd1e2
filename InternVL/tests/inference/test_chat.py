"""Commands and messages of a chat, without a terminal and without a model."""

import json

import pytest
from inference.prompts import picture

from internvl_chat.data.encode.encoder import RecordEncoder
from internvl_chat.data.encode.preprocessing import Preprocessing
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.sources.image_content import ImageOptions
from internvl_chat.data.sources.meta import DatasetSpec
from internvl_chat.inference.chat import COMMANDS, Chat
from internvl_chat.utils.errors import DataError, M3LLMError, UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working folder with images, also as the home folder."""
    for number, name in enumerate(["a.png", "my figure.png", "it's.png"]):
        picture(30 + number, 20, seed=number).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def chat(folder):
    return Chat(ImageOptions())


def texts(prompt):
    return [message.content for message in prompt.messages]


def test_conversation(chat):
    assert chat.run("/image a.png") == "Fig-0: a.png, 30 x 20 pixels"
    prompt = chat.prompt("What?")
    assert texts(prompt) == ["<image>\nWhat?"]
    assert [image.size for image in prompt.images] == [(30, 20)]
    chat.add("What?", "A.")
    assert texts(chat.prompt("Why?")) == ["<image>\nWhat?", "A.", "Why?"]
    chat.add("Why?", "B.")
    described = chat.run("""/image 'my figure.png' it\\'s.png""")
    assert described == "Fig-1: my figure.png, 31 x 20 pixels\nFig-2: it's.png, 32 x 20 pixels"
    prompt = chat.prompt("And these?")
    assert texts(prompt)[::4] == ["Fig-0: <image>\nWhat?", "Fig-1: <image>\nFig-2: <image>\nAnd these?"]
    assert len(prompt.images) == 3


def test_a_question_without_an_answer_is_not_part_of_the_conversation(chat):
    chat.run("/image a.png")
    chat.prompt("What?")
    assert texts(chat.prompt("Why?")) == ["<image>\nWhy?"]


@pytest.mark.parametrize(
    "arguments",
    ["~/a.png", "'~/a.png'", "./a.png", '"my figure.png"', "my\\ figure.png", "a.png\t", '"it\'s.png"'],
)
def test_paths(chat, arguments):
    assert chat.run(f"/image {arguments}").startswith("Fig-0: ")


def test_system_prompt(chat):
    chat.run("/system  Answer in one word. ")
    assert texts(chat.prompt("What?")) == ["Answer in one word.", "What?"]
    chat.run("/system")
    assert texts(chat.prompt("What?")) == ["What?"]


def test_reset(chat):
    chat.run("/system Be brief.")
    chat.run("/image a.png")
    chat.add("What?", "A.")
    chat.run("/image a.png")
    chat.run("/reset")
    assert texts(chat.prompt("Why?")) == ["Be brief.", "Why?"]
    assert chat.run("/image a.png").startswith("Fig-0")


def test_help_and_exit(chat):
    lines = chat.run("/help").splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert not chat.closed
    chat.run("/exit")
    assert chat.closed


def test_every_command_is_listed(chat):
    for command in COMMANDS:
        try:
            chat.run(command)
        except UsageError as error:
            assert "unknown" not in str(error)


def test_saved_conversations_are_training_records(chat, folder, tiny_model):
    """The records have the chat's messages and images, from any folder."""
    (folder / "chats.jsonl").write_text('{"conversations": []}')
    chat.run("/image a.png ~/my\\ figure.png")
    chat.add("What?", "A.")
    chat.add("Why?", "B.")
    chat.run("/image it\\'s.png")  # belongs to no question yet
    expected = chat.prompt("And this?").messages[:-1]
    assert chat.run("/save ~/chats.jsonl") == f"appended to {folder / 'chats.jsonl'}"
    chat.run("/reset")
    chat.run("/system Be brief.")
    chat.add("No image?", "No.")
    chat.run("/save chats.jsonl")
    first, second, third = map(json.loads, (folder / "chats.jsonl").read_text().splitlines())
    assert first == {"conversations": []}
    assert second["image"] == [str(folder / "a.png"), str(folder / "my figure.png")]
    assert [message["value"] for message in third["conversations"]] == ["Be brief.", "No image?", "No."]
    (folder / "second.jsonl").write_text(json.dumps(second))
    encoder = RecordEncoder(None, Preprocessing())
    records = RecordSet(DatasetSpec("chat", folder / "other", folder / "second.jsonl"), encoder)
    record = records.record(0)
    assert record.messages == expected
    assert [image.size for image in records.images(0, record)] == [(30, 20), (31, 20)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/images a.png", "unknown command '/images'; /help lists the commands"),
        ("/", "unknown command '/'"),
        ("/image", "/image requires the path of an image"),
        ("/image 'a.png", "a quotation mark is not closed"),
        ("/image none.png", "none.png does not exist"),
        ("/image broken.png none.png", "2 problems"),
        ("/image .", "it is not a regular file"),
        ("/image https://example.org/a.png", "is a URL"),
        ("/image ~nobody-here/a.png", "~nobody-here/a.png does not exist"),
        (f"/image {'x' * 5000}.png", "File name too long"),
        ("/save", "/save requires the path of one .jsonl file"),
        ("/save a.png", "one .jsonl file"),
        ("/save a.jsonl b.jsonl", "one .jsonl file"),
        ("/save new.jsonl", "nothing to save yet"),
    ],
)
def test_user_errors(chat, folder, line, message):
    with pytest.raises(M3LLMError, match=message.replace(".", r"\.")):
        chat.run(line)
    assert texts(chat.prompt("What?")) == ["What?"]
    assert not (folder / "new.jsonl").exists()


def test_errors_when_saving(chat, folder):
    chat.add("What?", "A.")
    (folder / "folder.jsonl").mkdir()
    for name, reason in (("folder.jsonl", "Is a directory"), ("none/a.jsonl", "No such file")):
        with pytest.raises(DataError, match=f"{name}: cannot be written: {reason}"):
            chat.run(f"/save {name}")


def test_an_empty_conversation_is_not_saved(chat, folder):
    chat.add("What?", "")
    with pytest.raises(DataError, match="all answers are empty"):
        chat.run("/save a.jsonl")
    assert not (folder / "a.jsonl").exists()
