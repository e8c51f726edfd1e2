"""`m3llm data check`, and the same check at the start of training."""

import json

import pytest
from helpers import flags
from PIL import Image
from small_sets import break_inside, noise, text_record, write_lines

from internvl_chat.cli import main as m3llm
from internvl_chat.data.record_set import RecordSet
from internvl_chat.train import internvl_chat_finetune
from internvl_chat.train.internvl_chat_finetune import main as train

SIX = (
    "boundingboxVQA",
    "compound_image",
    "multiple_subimage",
    "puretext",
    "single_subimage",
    "subimage_option",
)


@pytest.fixture
def rows(capfd):
    """Return a function that runs a command with --json and returns the exit code and the printed objects."""

    def run(*argv):
        capfd.readouterr()
        code = m3llm([str(a) for a in argv] + ["--json"])
        return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    return run


@pytest.fixture
def shown(capfd):
    """Return a function that runs a command and returns its exit code, stdout and stderr."""

    def run(*argv):
        capfd.readouterr()
        code = m3llm([str(a) for a in argv])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a dataset with images and its meta file.

    `truncated.jpg` lacks its end; the error in `broken.png` is detected only by decoding.
    """
    (tmp_path / "images").mkdir()
    noise(300, 100).save(tmp_path / "images/broken.png")
    break_inside(tmp_path / "images/broken.png")
    noise(300, 100).save(tmp_path / "images/wide.png")
    noise(300, 100).save(tmp_path / "images/truncated.jpg")
    content = (tmp_path / "images/truncated.jpg").read_bytes()
    (tmp_path / "images/truncated.jpg").write_bytes(content[:-2000])

    def write(*records, **entry):
        annotation = write_lines(tmp_path / "records.jsonl", list(records))
        settings = {"root": str(tmp_path / "images"), "annotation": str(annotation), "data_augment": False,
                    "repeat_time": 1, **entry}  # fmt: skip
        (tmp_path / "meta.json").write_text(json.dumps({"set": settings}))
        return tmp_path / "meta.json"

    return write


def shows(number: int, image: str) -> dict:
    return text_record(number, image=image)


class TestInspect:
    def test_fields_with_a_meaning(self, rows, write, tiny_model):
        draft = text_record(1)
        draft["conversations"][1]["weight"] = 0
        draft["conversations"] += text_record(2)["conversations"]
        meta = write(text_record(0, system="0123456789" * 9), draft, text_record(2))
        _, found = rows("data", "inspect", meta, "--model", tiny_model)
        own_system, draft, plain = found
        assert own_system["num_tokens"] > plain["num_tokens"]  # longer than InternVL's default system prompt
        assert draft["supervised"] == plain["supervised"] == ["a cat<|im_end|>"]

    def test_warnings_of_each_kind_once(self, shown, write, tiny_model):
        records = [text_record(i, answer="a cat<|im_end|>", rejected="b") for i in range(3)]
        code, _, err = shown("data", "inspect", write(*records), "--model", tiny_model)
        lines = [line for line in err.splitlines() if "WARNING dataset set" in line]
        assert code == 0
        assert [line.count("3 records, for example: ") for line in lines] == [1, 1]
        assert "ignored field" in err
        assert "control token" in err

    def test_escaped_control_tokens(self, rows, write, tiny_model):
        meta = write(text_record(0, answer="a cat<|im_end|>"))
        argv = ("data", "inspect", meta, "--model", tiny_model, "--ids")
        ids = [rows(*argv, "--escape_control_tokens", str(v))[1][0]["input_ids"] for v in (False, True)]
        assert len(ids[1]) > len(ids[0])


class TestCommand:
    def test_good_data(self, rows, sample_data, tiny_model):
        code, found = rows("data", "check", sample_data / "train.json", "--model", tiny_model)
        *sets, everything = found
        assert code == 0
        assert len(sets) == 6
        assert all(row["usable"] == row["records"] == 4 and row["errors"] == 0 for row in sets)
        assert all(row["tokens_5"] <= row["tokens_50"] <= row["tokens_most"] for row in sets)
        assert (everything["usable"], everything["errors"], everything["leaks"]) == (24, 0, 0)

    def test_agrees_with_inspect(self, rows, sample_data, tiny_model):
        _, records = rows("data", "inspect", sample_data / "train.json", "--model", tiny_model)
        _, found = rows("data", "check", sample_data / "train.json", "--model", tiny_model)
        for row in found[:-1]:
            of_set = [r for r in records if r["dataset"] == row["dataset"]]
            assert row["tokens"] == sum(r["num_tokens"] for r in of_set)
            assert row["tiles"] == sum(r["num_tiles"] for r in of_set)
            assert row["supervised"] == sum(r["num_supervised"] for r in of_set)

    def test_bad_data(self, shown, write, tiny_model, tmp_path):
        meta = write(text_record(0), text_record(0), shows(2, "no.png"), b"{")
        code, out, err = shown("data", "check", meta, "--model", tiny_model, "--report", tmp_path / "report")
        assert code == 1
        assert "Traceback" not in err
        for text in (
            "records.jsonl, line 3 (record 'r2'): the image ", "records.jsonl, line 4: not valid JSON",
            "line 2 (record 'r0'): same id as line 1", "2 of 4 records can be used; 2 errors, 2 warnings",
            f"report: {tmp_path / 'report/report.html'}",
        ):  # fmt: skip
            assert text in out
        lines = (tmp_path / "report/problems.jsonl").read_text().splitlines()
        assert [json.loads(line)["line"] for line in lines] == [3, 4, 2, 2]
        assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
            "lengths.png", "problems.jsonl", "report.html"
        ]  # fmt: skip

    def test_report_names_model_command_and_data(self, shown, write, tiny_model, tmp_path, monkeypatch):
        meta = write(shows(0, "wide.png"), shows(0, "wide.png"), shows(2, "truncated.jpg"))
        argv = ["data", "check", str(meta), "--model", str(tiny_model), "--report", str(tmp_path / "report")]
        monkeypatch.setattr("sys.argv", ["m3llm", *argv])
        shown(*argv)
        page = (tmp_path / "report/report.html").read_text()
        for text in (
            f"<dt>data</dt><dd>{meta}</dd>", f"<dt>model</dt><dd>{tiny_model}</dd>",
            f"<code>m3llm {' '.join(argv)}</code>", "image unreadable</div>", "wide.png<br>records.jsonl:2",
        ):  # fmt: skip
            assert text in page

    def test_warnings_are_not_errors(self, rows, write, tiny_model):
        code, found = rows("data", "check", write(text_record(0), text_record(0)), "--model", tiny_model)
        assert (code, found[-1]["warnings"]) == (0, 2)

    def test_content_that_is_lost(self, rows, write, tmp_path):
        images = tmp_path / "images"
        exif = Image.Exif()
        exif[0x0112] = 6
        noise(60, 30).save(images / "turned.jpg", exif=exif)
        noise(60, 30).save(images / "pages.tif", save_all=True, append_images=[noise(60, 30, seed=1)] * 2)
        noise(60, 30).convert("RGBA").save(images / "opaque.png")
        Image.new("RGBA", (60, 30)).save(images / "clear.png")
        names = ("turned.jpg", "pages.tif", "opaque.png", "clear.png")
        meta = write(*(shows(number, name) for number, name in enumerate(names)))
        lost = {"exif rotation": 1, "multiple frames": 1, "transparency": 2}
        code, found = rows("data", "check", meta)
        assert (code, found[0]["problems"]) == (0, lost)
        _, found = rows("data", "check", meta, "--check", "full")
        assert found[0]["problems"] == {**lost, "transparency": 1}
        _, found = rows("data", "check", meta, "--image_background", "white", "--exif_transpose", "True")
        assert found[0]["problems"] == {"multiple frames": 1}

    def test_images_that_are_not_read(self, rows, write):
        marked = text_record(1, image=["wide.png"])
        marked["conversations"][0]["value"] = "<image 1> what?"
        system = shows(2, ["wide.png"])
        system["conversations"].insert(0, {"from": "system", "value": "You see <image>."})
        meta = write(text_record(0, image_path="wide.png"), marked, system, text_record(3, source="wide.png"))
        code, found = rows("data", "check", meta)
        kinds = ("ignored file", "placeholders", "unsupported media", "unsupported placeholder")
        assert (code, found[0]["problems"]) == (1, dict.fromkeys(kinds, 1))

    def test_array_of_records_under_jsonl(self, rows, write, tmp_path):
        meta = write(text_record(0))
        (tmp_path / "records.jsonl").write_text(json.dumps([text_record(i) for i in range(9)], indent=1))
        code, found = rows("data", "check", meta)
        assert (code, found[0]["problems"]) == (1, {"file": 1})

    def test_annotation_file_instead_of_a_meta_file(self, rows, write, tmp_path):
        write(shows(0, "wide.png"))
        code, found = rows("data", "check", tmp_path / "records.jsonl", "--image_root", tmp_path / "images")
        assert (code, found[0]["dataset"], found[0]["usable"]) == (0, "records", 1)
        assert rows("data", "check", tmp_path / "records.jsonl")[0] == 1

    def test_full_check_decodes(self, rows, write, tiny_model):
        meta = write(shows(0, "broken.png"), shows(1, "wide.png"))
        assert rows("data", "check", meta, "--model", tiny_model)[0] == 0
        code, found = rows("data", "check", meta, "--model", tiny_model, "--check", "full")
        assert (code, found[0]["problems"]) == (1, {"image unreadable": 1})
        assert found[-1]["decoded"]

    def test_fast_check_finds_truncated_images(self, rows, shown, write, tiny_model):
        meta = write(shows(0, "truncated.jpg"), shows(1, "wide.png"), shows(2, "broken.png"))
        code, found = rows("data", "check", meta, "--model", tiny_model)
        assert (code, found[0]["problems"], found[0]["usable"]) == (1, {"image unreadable": 1}, 2)
        assert not found[-1]["decoded"]
        _, out, _ = shown("data", "check", meta, "--model", tiny_model)
        assert "truncated.jpg cannot be decoded: image file is truncated" in out
        assert "Images were opened, and decoded if the end of the file looks damaged." in out

    @pytest.mark.parametrize("how", ["fast", "full"])
    def test_images_that_change_after_a_check(self, rows, write, tiny_model, tmp_path, how):
        for number in range(9):
            noise(60, 30, seed=number).save(tmp_path / f"images/{number}.jpg")
        meta = write(*(shows(i, f"{i}.jpg") for i in range(9)))
        argv = ("data", "check", meta, "--model", tiny_model, "--check", how)
        assert (rows(*argv)[1][0]["usable"], rows(*argv)[1][0]["usable"]) == (9, 9)
        for number in range(4):
            (tmp_path / f"images/{number}.jpg").unlink()
        cut = tmp_path / "images/5.jpg"
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
        code, found = rows(*argv)
        assert (code, found[0]["usable"]) == (1, 4)
        assert found[0]["problems"] == {"image missing": 4, "image unreadable": 1}

    @pytest.mark.parametrize("path", ["taken", "taken/report"])
    def test_unwritable_report_folder_fails_before_the_check(self, shown, write, tmp_path, path, monkeypatch):
        (tmp_path / "taken").write_text("a file")
        monkeypatch.setattr(RecordSet, "check", lambda *_, **__: pytest.fail("looked at records"))
        code, out, err = shown("data", "check", write(text_record(0)), "--report", tmp_path / path)
        assert (code, out) == (2, "")
        assert f"--report {tmp_path / path}: the path or one of its parents is a file" in err
        assert (tmp_path / "taken").read_text() == "a file"

    def test_without_a_model_tokens_are_not_counted(self, shown, rows, write):
        meta = write(text_record(0), shows(1, "wide.png"), shows(2, "no.png"))
        code, found = rows("data", "check", meta)
        assert (code, found[0]["tokens"], found[0]["tiles"]) == (1, None, 4)
        code, out, _ = shown("data", "check", meta)
        assert "Tokens were not counted: pass the model's tokenizer with --model." in out

    def test_limits_from_the_command_line(self, rows, write, tiny_model):
        meta = write(text_record(0, answer="a cat " * 300), shows(1, "wide.png"))
        base = ("data", "check", meta, "--model", tiny_model)
        assert rows(*base)[0] == 0
        code, found = rows(*base, "--max_seq_length", 300)
        assert (code, found[0]["problems"], found[-1]["max_seq_length"]) == (1, {"too long": 1}, 300)
        code, found = rows(*base, "--max_seq_length", 300, "--truncate_text")
        assert (code, found[0]["problems"], found[0]["tokens_most"]) == (0, {"text truncated": 1}, 300)
        assert rows(*base, "--max_dynamic_patch", 1)[1][0]["tiles"] == 1

    @pytest.mark.parametrize("limit", [("--max_seq_length", 300), ("--truncate_text",)])
    def test_token_limits_need_a_model(self, shown, write, limit):
        code, out, err = shown("data", "check", write(text_record(0)), *limit)
        assert (code, out) == (2, "")
        assert "--max_seq_length and --truncate_text require --model, whose tokenizer" in err

    def test_user_errors(self, shown, write, tmp_path, tiny_model):
        for argv, message in (
            ((tmp_path / "no.json",), "no such meta file"),
            (
                (write(text_record(0)), "--against", tmp_path / "nowhere"),
                "no such file or folder",
            ),
            ((write(text_record(0)), "--model", tmp_path), "no config.json"),
        ):
            code, _, err = shown("data", "check", *argv)
            assert code == 1
            assert message in err
            assert "Traceback" not in err

    def test_leaks(self, shown, rows, write, tmp_path):
        (tmp_path / "bench").mkdir()
        noise(300, 100).save(tmp_path / "bench/PMC42_x.png")
        meta = write(text_record(0, id="PMC42-1"), shows(1, "wide.png"), text_record(2))
        code, found = rows("data", "check", meta, "--against", tmp_path / "bench", "--report", tmp_path / "r")
        assert (code, found[0]["leaks"]) == (1, {"same article": 1, "same image": 1})
        lines = [json.loads(line) for line in (tmp_path / "r/problems.jsonl").read_text().splitlines()]
        assert [(row["line"], row["kind"], row["severity"]) for row in lines] == [
            (1, "same article", "leak"), (2, "same image", "leak")
        ]  # fmt: skip
        assert "PMC42_x.png" in lines[1]["message"]
        assert found[-1]["not_compared"] == 0
        (tmp_path / "other").mkdir()
        noise(300, 100, seed=3).save(tmp_path / "other/PMC43_x.png")
        code, out, _ = shown("data", "check", meta, "--against", tmp_path / "other")
        assert code == 0
        assert "compared with 1 PMC id and 1 image" in out

    def test_meta_file_after_the_benchmark(self, rows, shown, write, tmp_path):
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench/items.tsv").write_text("PMC42")
        (tmp_path / "bench/more.tsv").write_text("PMC43")
        meta, bench = write(text_record(0, id="PMC42-1")), tmp_path / "bench"
        expected = rows("data", "check", meta, "--against", bench)
        assert rows("data", "check", "--against", bench, meta) == expected
        assert rows("data", "check", "--against", bench, "--workers", "1", meta) == expected
        files = sorted(bench.iterdir())
        assert rows("data", "check", "--against", *files, meta) == expected
        for command in (("data", "check"), ("data", "check", "--against", bench)):
            code, _, error = shown(*command)
            assert code == 2 and "META (the meta file to check) is required" in error

    def test_benchmark_files_that_are_not_compared(self, shown, rows, write, tmp_path):
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench/items.tsv").write_text("index\tquestion\n1\tas in PMC42\n")
        (tmp_path / "bench/items.parquet").write_bytes(bytes(99))
        (tmp_path / "bench/truncated.jpg").write_bytes((tmp_path / "images/truncated.jpg").read_bytes())
        meta = write(text_record(0, id="PMC42-1"), shows(1, "truncated.jpg"))
        argv = ("data", "check", meta, "--against", tmp_path / "bench", "--report", tmp_path / "r")
        code, out, _ = shown(*argv)
        assert code == 1
        assert "compared with 1 PMC id and 1 image" in out
        assert "not compared" in out
        for name in (
            "items.parquet: neither an image nor text",
            "truncated.jpg: cannot be decoded, so only its bytes are compared",
        ):
            assert f"warning: {tmp_path / 'bench' / name}" in out
        assert "1 error, 2 warnings, 2 leaks" in out
        lines = [json.loads(line) for line in (tmp_path / "r/problems.jsonl").read_text().splitlines()]
        assert [(row["kind"], row["severity"]) for row in lines[1:]] == [
            ("not compared", "warning"), ("not compared", "warning"), ("same article", "leak"),
            ("same image", "leak"),
        ]  # fmt: skip
        assert "items.parquet" in (tmp_path / "r/report.html").read_text()
        assert rows(*argv)[1][-1]["not_compared"] == 2


class TestRealFigures:
    @pytest.fixture
    def meta(self, shared, tmp_path):
        entry = {
            "root": str(shared / "pmc_mi/images"),
            "data_augment": False,
            "repeat_time": 1,
            "length": "25",
        }
        sets = {name: {**entry, "annotation": str(shared / f"pmc_mi/jsonl/{name}.jsonl")} for name in SIX}
        (tmp_path / "real.json").write_text(json.dumps(sets))
        return tmp_path / "real.json"

    def test_all_records_are_usable(self, rows, meta, shared, tmp_path):
        model = shared / "conformance/tiny"
        code, found = rows(
            "data", "check", meta, "--model", model, "--check", "full", "--report", tmp_path / "r"
        )
        assert code == 0
        assert [row["usable"] for row in found] == [25] * 6 + [150]
        assert found[-1]["errors"] == found[-1]["warnings"] == 0
        assert (tmp_path / "r/problems.jsonl").read_text() == ""

    def test_contamination_by_their_benchmark(self, rows, meta, shared):
        code, found = rows("data", "check", meta, "--against", shared / "pmc_mi/benchmark")
        assert code == 1
        assert [row["leaks"]["same article"] for row in found[:-1] if row["dataset"] != "puretext"] == [
            25
        ] * 5
        assert all(row["leaks"].get("same image") == 25 for row in found[:-1] if row["dataset"] != "puretext")

    def test_contamination_by_one_task(self, rows, shared, tmp_path):
        """The benchmark of a task matches only the images of that task."""
        task = "single_subimage"
        items = json.loads((shared / "pmc_mi/benchmark/single_subimageVQA_benchmark.json").read_text())
        names = {name for item in items for name in item["images"]}
        records = [
            json.loads(line) for name in SIX for line in (shared / f"pmc_mi/jsonl/{name}.jsonl").open()
        ]
        matching = [
            r
            for r in records
            if names & set([r["image"]] if isinstance(r.get("image"), str) else r.get("image", []))
        ]
        annotation = write_lines(tmp_path / "all.jsonl", records)
        entry = {
            "root": str(shared / "pmc_mi/images"),
            "annotation": str(annotation),
            "data_augment": False,
            "repeat_time": 1,
        }
        (tmp_path / "all.json").write_text(json.dumps({task: entry}))
        code, found = rows(
            "data", "check", tmp_path / "all.json", "--against",
            shared / "pmc_mi/benchmark/single_subimageVQA_benchmark.json",
        )  # fmt: skip
        assert code == 1
        assert found[0]["leaks"]["same image"] == len(matching) >= 25
        assert "similar image" not in found[0]["leaks"]


class TestTraining:
    @pytest.fixture
    def start(self, tiny_model, tmp_path, capfd):
        """Return a function that trains two steps and returns the exit code, stderr and the output folder."""

        def start(meta, **changes):
            values = {"model_name_or_path": tiny_model, "meta_path": meta, "output_dir": tmp_path / "out",
                      "max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 3,
                      "train_sampling_strategy": "sequential"}  # fmt: skip
            capfd.readouterr()
            code = train(flags(**{**values, **changes}))
            return code, capfd.readouterr().err, values["output_dir"]

        return start

    @pytest.fixture
    def loaded(self, monkeypatch):
        """List that is empty if no weights were read."""
        calls, load = [], internvl_chat_finetune.load_for_training
        monkeypatch.setattr(
            internvl_chat_finetune, "load_for_training", lambda plan: (calls.append(plan), load(plan))[1]
        )
        return calls

    def test_error_before_weights_are_read(self, start, write, loaded):
        code, err, out = start(write(text_record(0), shows(1, "no.png"), text_record(2), b"{"))
        assert code == 1
        assert loaded == []
        assert not out.exists()
        assert "2 records cannot be used:" in err
        assert "records.jsonl, line 2 (record 'r1'): the image" in err
        assert "records.jsonl, line 4: not valid JSON" in err
        assert "Fix or remove these records, or exclude them with --on_bad_record skip" in err

    def test_full_check_finds_errors_in_image_data(self, start, write, loaded):
        code, err, out = start(write(text_record(0), shows(1, "truncated.jpg")), check="full")
        assert (code, loaded, out.exists()) == (1, [], False)
        assert "records.jsonl, line 2 (record 'r1'): the image" in err
        assert "truncated.jpg cannot be decoded: image file is truncated" in err

    def test_skip_excludes_records_by_id(self, start, write, metrics):
        records = [text_record(i) for i in range(6)]
        records[1:1] = [shows(10, "no.png")]
        code, err, out = start(write(*records), on_bad_record="skip", max_bad_fraction=0.2)
        assert code == 0
        assert "1 record excluded; ledger.jsonl lists all of them:\n" in err
        assert "records.jsonl, line 2 (record 'r10'): the image " in err
        ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
        trained = [index for row in ledger for _, index in row.get("trained", [])]
        assert trained == [0, 2, 3, 4, 5, 6]
        assert [row["records"] for row in metrics(out)] == [3, 3]

    def test_skip_of_a_record_that_fails_during_training(self, start, write, tmp_path):
        records = [text_record(0), shows(1, "broken.png"), text_record(2), text_record(3)]
        code, err, _ = start(write(*records), max_steps=1)
        assert code == 1
        assert "broken.png cannot be decoded" in err
        other = tmp_path / "other"
        code, err, _ = start(
            write(*records), max_steps=1, on_bad_record="skip", max_bad_fraction=0.3, output_dir=other
        )
        assert code == 0
        assert "record skipped: " in err

    def test_too_many_records_to_skip(self, start, write, loaded):
        records = [text_record(i) for i in range(9)] + [shows(9, "no.png")]
        code, err, out = start(write(*records), on_bad_record="skip")
        assert (code, loaded, out.exists()) == (1, [], False)
        assert "1 of 10 records cannot be used (10.00%), more than --max_bad_fraction 0.01 allows:" in err
        assert "(record 'r9'): the image" in err

    def test_flags(self, start, write):
        code, err, _ = start(write(text_record(0)), max_bad_fraction=2)
        assert (code, "--max_bad_fraction 2.0 must be at least 0 and at most 1" in err) == (2, True)
        code, err, _ = start(write(text_record(0)), on_bad_record="ignore")
        assert (code, "--on_bad_record: invalid choice: 'ignore'" in err) == (2, True)

    def test_truncation_is_logged(self, start, write):
        meta = write(*[text_record(i, answer="a cat " * (200 if i == 1 else 1)) for i in range(4)])
        code, err, _ = start(meta, max_seq_length=300)
        assert code == 1
        assert "more than max_seq_length 300" in err
        code, err, _ = start(meta, max_seq_length=300, truncate_text=True)
        assert code == 0
        assert "records.jsonl, line 2 (record 'r1'): the last " in err
        assert "text truncated: 1" in err

    def test_warnings_are_logged(self, start, write):
        meta = write(*[text_record(0)] * 3)
        code, err, _ = start(meta)
        assert code == 0
        assert "data check (fast): 3 records, 0 unusable, duplicate id: 2, duplicate record: 2" in err
        code, err, _ = start(meta, check="off", overwrite_output_dir=True)
        assert code == 0
        assert "duplicate" not in err

    def test_image_deleted_after_the_check_is_an_error_before_weights_are_read(
        self, start, write, rows, tiny_model, tmp_path, loaded
    ):
        for number in range(3):
            noise(60, 30, seed=number).save(tmp_path / f"images/{number}.png")
        meta = write(*[shows(i, f"{i}.png") for i in range(3)])
        assert rows("data", "check", meta, "--model", tiny_model, "--max_dynamic_patch", 6)[0] == 0
        (tmp_path / "images/1.png").unlink()
        code, err, _ = start(meta, max_dynamic_patch=6)
        assert (code, loaded) == (1, [])
        assert "records.jsonl, line 2 (record 'r1'): the image" in err

    def test_training_uses_the_index_of_the_check(self, start, write, rows, tiny_model, monkeypatch):
        """Training with the same settings reuses the index of `m3llm data check`."""
        meta = write(*[shows(i, "wide.png") for i in range(3)])
        argv = ("data", "check", meta, "--model", tiny_model, "--max_dynamic_patch", 6)
        assert rows(*argv)[0] == 0
        monkeypatch.setattr(RecordSet, "check", lambda *_, **__: pytest.fail("looked at again"))
        assert start(meta, max_dynamic_patch=6)[0] == 0
