"""Meta files as users write them: accepted values, and errors that list all mistakes."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from internvl_chat.data.sources.jsonl import RecordFile
from internvl_chat.data.sources.meta import DatasetSpec, load_meta
from internvl_chat.utils.errors import DataError

ENTRY = {"root": "images", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 1}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    return tmp_path


@pytest.fixture(autouse=True)
def _warnings_are_seen(monkeypatch):
    monkeypatch.setattr(logging.getLogger("internvl_chat"), "propagate", True)


def load(folder: Path, meta) -> list[DatasetSpec]:
    file = folder / "meta.json"
    file.write_text(meta if isinstance(meta, str) else json.dumps(meta), encoding="utf-8")
    return load_meta(file, folder)


def load_one(folder: Path, **changes) -> DatasetSpec:
    (spec,) = load(folder, {"set": {**ENTRY, **changes}})
    return spec


def problem_of(folder: Path, meta) -> DataError:
    with pytest.raises(DataError) as caught:
        load(folder, meta)
    return caught.value


def test_all_fields(folder):
    spec = load_one(folder, data_augment=True, repeat_time=0.5, max_dynamic_patch=6, length=3)
    assert spec == DatasetSpec("set", folder / "images", folder / "a.jsonl", True, 0.5, 6, 3)


def test_defaults_and_order(folder):
    specs = load(folder, {name: ENTRY for name in ("z", "a", "m")})
    assert [spec.name for spec in specs] == ["z", "a", "m"]
    assert [(spec.max_dynamic_patch, spec.length) for spec in specs] == [(None, None)] * 3


class TestPaths:
    def test_relative_paths_are_relative_to_data_root(self, folder, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere") / "meta.json"
        elsewhere.write_text(json.dumps({"set": ENTRY}))
        (spec,) = load_meta(elsewhere, folder)
        assert (spec.root, spec.annotation) == (folder / "images", folder / "a.jsonl")

    def test_fallback_to_the_folder_of_the_meta_file(self, folder, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (folder / "meta.json").write_text(json.dumps({"set": ENTRY}))
        (folder / "images").mkdir()
        (spec,) = load_meta(folder / "meta.json", elsewhere)
        assert (spec.root, spec.annotation) == (folder / "images", folder / "a.jsonl")

    def test_both_exist(self, folder, tmp_path_factory, caplog):
        data_root = tmp_path_factory.mktemp("data")
        (data_root / "a.jsonl").write_text("{}\n")
        (folder / "meta.json").write_text(json.dumps({"set": ENTRY}))
        (spec,) = load_meta(folder / "meta.json", data_root)
        assert spec.annotation == data_root / "a.jsonl"
        [message] = caplog.messages
        assert message.endswith(
            f"'annotation' resolves to {data_root / 'a.jsonl'}; {folder / 'a.jsonl'} also exists"
        )

    def test_neither_exists(self, folder, tmp_path_factory):
        data_root = tmp_path_factory.mktemp("data")
        (folder / "meta.json").write_text(json.dumps({"set": {**ENTRY, "annotation": "b.jsonl"}}))
        with pytest.raises(DataError) as caught:
            load_meta(folder / "meta.json", data_root)
        expected = f"{data_root / 'b.jsonl'} does not exist, and neither does {folder / 'b.jsonl'}"
        assert str(caught.value).endswith(expected)

    def test_absolute_paths(self, folder):
        assert load_one(folder, root="/data/images").root == Path("/data/images")

    def test_home(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder))
        spec = load_one(folder, root="~/pictures", annotation="~/a.jsonl")
        assert (spec.root, spec.annotation) == (folder / "pictures", folder / "a.jsonl")

    def test_home_in_the_path_of_the_meta_file(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder))
        (folder / "meta.json").write_text(json.dumps({"set": ENTRY}))
        assert [spec.name for spec in load_meta("~/meta.json", folder)] == ["set"]

    @pytest.mark.parametrize("written", ["$PMC_TEST/images", "${PMC_TEST}/images"])
    def test_variable(self, folder, monkeypatch, written):
        monkeypatch.setenv("PMC_TEST", "/big/disk")
        assert load_one(folder, root=written).root == Path("/big/disk/images")

    def test_variable_with_a_relative_path(self, folder, monkeypatch):
        monkeypatch.setenv("PMC_TEST", "sub")
        assert load_one(folder, root="$PMC_TEST/images").root == folder / "sub" / "images"

    @pytest.mark.parametrize("written", ["$PMC_TEST_UNSET/images", "a/${PMC_TEST_UNSET}"])
    @pytest.mark.parametrize("key", ["root", "annotation"])
    def test_unset_variable(self, folder, monkeypatch, key, written):
        monkeypatch.delenv("PMC_TEST_UNSET", raising=False)
        message = str(problem_of(folder, {"qa": {**ENTRY, key: written}}))
        assert f"qa: '{key}' uses $PMC_TEST_UNSET, which is not set" in message
        assert "export PMC_TEST_UNSET=" in message

    def test_missing_annotation_file(self, folder):
        message = str(problem_of(folder, {"qa": {**ENTRY, "annotation": "nowhere.jsonl"}}))
        assert f"qa: the annotation file {folder / 'nowhere.jsonl'} does not exist" in message

    def test_folder_instead_of_an_annotation_file(self, folder):
        (folder / "sub").mkdir()
        (folder / "sub/part.jsonl").touch()
        with pytest.raises(DataError, match=r"it is a folder; use one file per dataset: part\.jsonl"):
            RecordFile(load_one(folder, annotation="sub").annotation)


class TestRepeatTime:
    @pytest.mark.parametrize("value", [0.001, 0.5, 1, 1.0, 2, 3.0, 40])
    def test_fractions_and_whole_numbers(self, folder, value):
        assert load_one(folder, repeat_time=value).repeat_time == value

    @pytest.mark.parametrize("value", [1.5, 2.25, 0, 0.0, -1, -0.5, "1", None, True, [1]])
    def test_other_values_are_rejected(self, folder, value):
        message = str(problem_of(folder, {"qa": {**ENTRY, "repeat_time": value}}))
        assert "qa: 'repeat_time' must be a fraction between 0 and 1 or a whole number" in message
        assert message.endswith(repr(value))


@pytest.mark.parametrize(("written", "read"), [(7, 7), ("7", 7), (" 40382 ", 40382), (0, 0), (None, None)])
def test_length(folder, written, read):
    assert load_one(folder, length=written).length == read


@pytest.mark.parametrize("value", ["seven", "", "-1", -1, 1.5, "1.5", "40,382", True, []])
def test_invalid_length(folder, value):
    assert f"qa: 'length' must be a number of records, found {value!r}" in str(
        problem_of(folder, {"qa": {**ENTRY, "length": value}})
    )


@pytest.mark.parametrize("value", [0, -1, 1.0, "6", True])
def test_invalid_max_dynamic_patch(folder, value):
    message = str(problem_of(folder, {"qa": {**ENTRY, "max_dynamic_patch": value}}))
    assert f"qa: 'max_dynamic_patch' must be a whole number from 1 to 100, found {value!r}" in message


@pytest.mark.parametrize("value", ["true", 1, 0, None])
def test_invalid_data_augment(folder, value):
    message = str(problem_of(folder, {"qa": {**ENTRY, "data_augment": value}}))
    assert f"qa: 'data_augment' must be true or false, found {value!r}" in message


@pytest.mark.parametrize("key", ["annotation", "root"])
def test_missing_key(folder, key):
    entry = {name: value for name, value in ENTRY.items() if name != key}
    assert f"qa: {key!r} is missing" in str(problem_of(folder, {"qa": entry}))


@pytest.mark.parametrize("key", ["root", "annotation"])
@pytest.mark.parametrize("value", [None, 3, ["a.jsonl"]])
def test_path_of_another_type(folder, key, value):
    assert f"qa: {key!r} must be a path, found {value!r}" in str(
        problem_of(folder, {"qa": {**ENTRY, key: value}})
    )


def test_problems_of_all_entries_are_listed(folder):
    error = problem_of(
        folder,
        {
            "first": {**ENTRY, "repeat_time": 1.5, "length": "many"},
            "fine": ENTRY,
            "second": "a.jsonl",
            "third": {"root": 1, "annotation": "none.jsonl", "data_augment": "yes", "max_dynamic_patch": 0},
        },
    )
    numbered = [line.split(". ", 1)[1] for line in str(error).splitlines()[1:]]
    assert error.file == folder / "meta.json"
    assert str(error).splitlines()[0].endswith("7 problems:")
    assert [line.split(":")[0] for line in numbered] == ["first"] * 2 + ["second"] + ["third"] * 4
    words = ("repeat_time", "length", "object", "root", "none.jsonl", "data_aug", "max_dyn")
    assert all(word in line for word, line in zip(words, numbered, strict=True))


@pytest.mark.parametrize(("written", "suggested"), [("repeat_times", "repeat_time"), ("lenght", "length")])
def test_unknown_key_suggests_a_similar_name(folder, caplog, written, suggested):
    spec = load_one(folder, **{written: 2})
    assert (spec.repeat_time, spec.length) == (1, None)
    assert caplog.messages == [f"dataset set: unknown key '{written}', did you mean '{suggested}'?"]


def test_unknown_key_without_a_similar_name(folder, caplog):
    load_one(folder, zzzzzz=2)
    assert caplog.messages == ["dataset set: unknown key 'zzzzzz'"]


def test_valid_entry_logs_nothing(folder, caplog):
    load_one(folder, max_dynamic_patch=1, length="1")
    assert caplog.messages == []


def test_only_root_and_annotation_are_required(folder):
    (spec,) = load(folder, {"set": {"root": "images", "annotation": "a.jsonl"}})
    assert (spec.data_augment, spec.repeat_time) == (False, 1)


RECORD = json.dumps({"id": 1, "conversations": [{"from": "human", "value": "?"}]})
ANNOTATIONS = {
    "a.jsonl": f"{RECORD}\n{RECORD}\n".encode(),
    "one.jsonl": f"{RECORD}\n".encode(),
    "no-suffix": f"{RECORD}\n{RECORD}\n".encode(),
    "a.json": f"[{RECORD}]".encode(),
    "b.json": f"\ufeff[\n {RECORD}\n]".encode(),
    "a.jsonl.gz": gzip.compress(RECORD.encode()),
    "a.parquet": b"PAR1",
    "broken.jsonl": b'{"id": 1, "conv\n',
}


class TestAnnotationFileAsMeta:
    @pytest.mark.parametrize("name", ANNOTATIONS)
    def test_with_image_root(self, folder, name):
        (folder / name).write_bytes(ANNOTATIONS[name])
        (spec,) = load_meta(folder / name, "/nowhere", folder / "images")
        assert spec == DatasetSpec(name.split(".")[0], folder / "images", folder / name)

    @pytest.mark.parametrize("name", ANNOTATIONS)
    def test_without(self, folder, name):
        (folder / name).write_bytes(ANNOTATIONS[name])
        with pytest.raises(DataError, match="an annotation file, not a meta file; add --image_root FOLDER"):
            load_meta(folder / name, folder)

    def test_image_root_with_a_meta_file(self, folder):
        (folder / "meta.json").write_text(json.dumps({"set": ENTRY}))
        with pytest.raises(DataError, match="sets 'root' for each dataset; remove --image_root"):
            load_meta(folder / "meta.json", folder, folder)


class TestFile:
    def test_missing(self, folder):
        with pytest.raises(DataError, match=r"nowhere\.json: no such meta file.*--meta_path"):
            load_meta(folder / "nowhere.json", folder)

    def test_a_folder(self, folder):
        with pytest.raises(DataError, match="cannot be read"):
            load_meta(folder, folder)

    def test_bad_json_reports_line_and_column(self, folder):
        error = problem_of(folder, '{\n  "set": {\n    "root": "a",\n    "annotation" "b"\n  }\n}\n')
        assert error.line == 4
        assert "meta.json, line 4: not valid JSON" in str(error)
        assert "column 18" in str(error)

    def test_not_utf8(self, folder):
        (folder / "meta.json").write_bytes(b'{"set\xff": 1}')
        with pytest.raises(DataError, match="cannot be read"):
            load_meta(folder / "meta.json", folder)

    @pytest.mark.parametrize("text", ["[]", "null", '"a"', "3"])
    def test_not_an_object(self, folder, text):
        assert "must be a JSON object" in str(problem_of(folder, text))

    def test_empty_object(self, folder):
        assert "contains no datasets" in str(problem_of(folder, "{}"))

    def test_byte_order_mark(self, folder):
        (spec,) = load(folder, "\ufeff" + json.dumps({"set": ENTRY}))
        assert spec.name == "set"

    def test_names_in_any_script(self, folder):
        (spec,) = load(folder, json.dumps({"图像": ENTRY}, ensure_ascii=False))
        assert spec.name == "图像"

    def test_duplicate_dataset(self, folder):
        entry = json.dumps(ENTRY)
        assert "duplicate key 'qa'" in str(problem_of(folder, f'{{"qa": {entry}, "qa": {entry}}}'))

    def test_duplicate_key(self, folder):
        duplicate = json.dumps(ENTRY)[:-1] + ', "repeat_time": 2}'
        assert "duplicate key 'repeat_time'" in str(problem_of(folder, f'{{"qa": {duplicate}}}'))


@pytest.mark.parametrize("value", ["Infinity", "1e999", "NaN", "-1", "0"])
def test_invalid_repeat_time(folder, value):
    entry = {"root": ".", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 1}
    (folder / "a.jsonl").write_text("{}")
    text = json.dumps({"set": entry}).replace('"repeat_time": 1', f'"repeat_time": {value}')
    (folder / "meta.json").write_text(text)
    with pytest.raises(DataError, match="'repeat_time' must be a fraction"):
        load_meta(folder / "meta.json", folder)


@pytest.mark.parametrize("name", ["M3LLM_EMPTY", "M3LLM_UNSET"])
def test_variable_without_a_value(folder, monkeypatch, name):
    monkeypatch.setenv("M3LLM_EMPTY", "")
    assert f"export {name}=FOLDER" in str(problem_of(folder, {"set": {"root": f"${name}/images"}}))


def test_dollar_in_the_value_of_a_variable(folder, monkeypatch):
    monkeypatch.setenv("M3LLM_ROOT", "/a$b")
    assert load_one(folder, root="$M3LLM_ROOT/c").root == Path("/a$b/c")


def test_home_of_an_unknown_user(folder):
    assert "~no-such-user/x" in str(problem_of(folder, {"set": {"root": "~no-such-user/x"}}))


def test_meta_nested_too_deeply(folder):
    (folder / "meta.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        load_meta(folder / "meta.json", folder)
