"""The store: whole records, many processes, damaged files, and the tables made from them."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lowra.errors import LowraError
from lowra.records import LAYER, SCORE, Store, dumps, loads, model_digest, read, trials, write_records


def layer(key: str, **fields: Any) -> dict[str, Any]:
    """A layer's record, all fields there."""
    record = {
        "kind": LAYER,
        "key": key,
        "subset": "vit",
        "source": "mini",
        "data": "f",
        "n_loras": 3,
        "trial": 0,
        "models": [0, 1, 2],
        "seed": 0,
        "variant": "v1",
        "method": "mean_lora",
        "pretty": "Mean LoRA",
        "label": "Mean LoRA",
        "reference": "",
        "options": "{}",
        "merge_dtype": "float32",
        "merge_order": "once",
        "knows_rank": True,
        "device": "cpu",
        "threads": 1,
        "layer_model": "",
        "layer_name": f"layer.{key}",
        "layer_type": "q",
        "depth": 0,
        "d": 4,
        "k": 4,
        "rank": 2,
        "w_error": -5.0,
        "exact_fraction": 0.5,
        "exact_layer": False,
        "floor_w_error": -18.0,
        "candidates": 1,
        "seconds": 0.25,
        "status": "ok",
        "failed": False,
        "stats": "{}",
        "weights": [f"w{key}"],
        "history": None,
    }
    return record | fields


def opened(folder: Path, **context: Any) -> Store:
    store = Store(folder)
    store.refresh()
    store.open({"title": "ViT", **context})
    return store


@pytest.mark.parametrize("value", [-5.25, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("closed", [False, True])
def test_numbers_come_back(tmp_path: Path, value: float, closed: bool) -> None:
    store = opened(tmp_path)
    store.append(layer("a", w_error=value, stats=dumps({"x": value, "n": 3, "word": "yes"})))
    if closed:
        store.close()
        assert [path.suffix for path in (tmp_path / "records").iterdir()] == [".parquet"]
    (row,) = read([tmp_path]).layers.to_dict("records")
    for back in (row["w_error"], row["stat_x"]):
        assert back == value or (math.isnan(back) and math.isnan(value))
    assert (row["stat_n"], row["stat_word"], row["models"], row["knows_rank"]) == (3, "yes", [0, 1, 2], True)


def test_failed_records_are_tried_again_and_give_way(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(layer("a", failed=True, w_error=math.nan))
    assert not store.done(LAYER, "a")
    store.append(layer("a", w_error=-7.0))
    assert store.done(LAYER, "a")
    assert read([tmp_path]).layers["w_error"].tolist() == [-7.0]


def test_of_two_records_of_one_key_every_reader_takes_the_same(tmp_path: Path) -> None:
    first, second = opened(tmp_path, who=1), opened(tmp_path, who=2)
    second.append(layer("a", w_error=-1.0))
    first.append(layer("a", w_error=-2.0))
    for store in (first, second, opened(tmp_path)):
        store.refresh()
        found = store.get(LAYER, "a")
        assert found is not None
        assert found["w_error"] == -1.0


def test_closing_while_another_reads_loses_nothing(tmp_path: Path) -> None:
    writer, reader = opened(tmp_path), Store(tmp_path)
    writer.append(layer("a"))
    reader.refresh()
    writer.append(layer("b"))
    writer.close()
    writer.open({"title": "ViT"})
    writer.append(layer("c"))
    reader.refresh()
    assert {record["key"] for record in reader.all(LAYER)} == {"a", "b", "c"}


def test_a_journal_that_turns_to_parquet_between_look_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = opened(tmp_path), Store(tmp_path)
    writer.append(layer("a"))
    real = os.listdir

    def listed(place: Any) -> list[str]:
        names = real(place)
        writer.close()
        return names

    monkeypatch.setattr("lowra.records.os.listdir", listed)
    reader.refresh()
    assert [record["key"] for record in reader.all(LAYER)] == ["a"]


def test_processes_at_work_see_each_other_before_anything_is_found(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    first.claim(["a"])
    second.claim(["b"])
    first.refresh()
    second.refresh()
    assert first.others
    assert second.others
    first.close()
    second.close()  # with nothing found, nothing is left
    assert not list((tmp_path / "records").iterdir())
    late = opened(tmp_path)
    late.refresh()
    assert not late.others


def test_what_a_process_is_about_to_do_is_its_own_while_it_lives(tmp_path: Path) -> None:
    worker, other = opened(tmp_path), opened(tmp_path)
    worker.claim(["a", "b"])
    other.refresh()
    worker.refresh()
    assert other.claimed("a")
    assert not other.claimed("c")
    assert not worker.claimed("a")  # by others, that is
    (journal,) = (tmp_path / "records").iterdir()
    host, _, token = journal.name.rsplit("-", 2)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    places = {f"{host}-{gone.pid}-{token}": False, f"elsewhere-{gone.pid}-{token}": True, "x.jsonl": True}
    for name, held in places.items():
        folder = tmp_path / name / "records"
        folder.mkdir(parents=True)
        shutil.copy(journal, folder / name)
        late = opened(folder.parent)
        assert late.claimed("a") is held, name
    worker.close()
    other.refresh()
    assert not other.claimed("a")


def test_a_line_under_way_is_read_when_it_is_whole(tmp_path: Path) -> None:
    writer, reader = opened(tmp_path), Store(tmp_path)
    writer.append(layer("a"))
    (journal,) = (tmp_path / "records").iterdir()
    line = dumps({**layer("b"), "context": "c", "finished": "2026"}).encode()
    whole = b"%08x %s\n" % (zlib.crc32(line), line)
    with journal.open("ab") as file:
        file.write(whole[:100])
        file.flush()
        reader.refresh()
        assert {record["key"] for record in reader.all(LAYER)} == {"a"}
        file.write(whole[100:])
    reader.refresh()
    assert {record["key"] for record in reader.all(LAYER)} == {"a", "b"}


DAMAGE = {
    "empty.jsonl": b"",
    "noise.jsonl": b"\xff\xfe\x00noise\n\xff\n",
    "braces.jsonl": b"{}\n",
    "number.jsonl": b"%08x 3\n" % zlib.crc32(b"3"),
    "no_record.jsonl": b"%08x {}\n" % zlib.crc32(b"{}"),
    "kind.jsonl": b'%08x {"kind":"x"}\n' % zlib.crc32(b'{"kind":"x"}'),
    "claim.jsonl": b'%08x {"claim":3}\n' % zlib.crc32(b'{"claim":3}'),
    "deep.jsonl": b"%08x %s\n" % (zlib.crc32(b"[" * 100_000), b"[" * 100_000),
    "config.jsonl": b'%08x {"define":"b","value":{"config":5}}\n' % zlib.crc32(b'{"define":"b","value":{"config":5}}'),
    "bare.jsonl": b'%08x {"kind":"layer","key":"k","context":"c","finished":"2026"}\n'
    % zlib.crc32(b'{"kind":"layer","key":"k","context":"c","finished":"2026"}'),
    "cut.parquet": b"PAR1",
    "empty.parquet": b"",
    ".hidden.jsonl": b"noise\n",
    "else.txt": b"noise",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_left_out_and_block_nobody(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = opened(tmp_path)
    store.append(layer("a"))
    (tmp_path / "records" / name).write_bytes(DAMAGE[name])
    again = opened(tmp_path)
    assert [record["key"] for record in again.all(LAYER)] == ["a"]
    again.append(layer("b"))
    assert len(read([tmp_path]).layers) == 2
    if name not in ("empty.jsonl", ".hidden.jsonl", "else.txt"):
        assert "damaged" in capsys.readouterr().err
        assert "left out" in read([tmp_path]).notes[0]


def test_what_is_no_file_is_left_out_and_waited_for_by_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = opened(tmp_path)
    store.append(layer("a"))
    place = tmp_path / "records"
    (place / "x.jsonl").mkdir()
    (place / "y.parquet").mkdir()
    (place / "z.jsonl").symlink_to("z.jsonl")
    os.mkfifo(place / "pipe.jsonl")
    again = opened(tmp_path)
    again.refresh()
    assert [record["key"] for record in again.all(LAYER)] == ["a"]
    assert len(again.damaged) == 4  # each told once
    assert capsys.readouterr().err.count("left out, damaged") == 4


def test_records_of_a_later_version_or_of_other_types_are_left_out(tmp_path: Path) -> None:
    whole = {**layer("a"), "context": "c", "finished": "2026"}
    write_records([whole], {"c": {}}, tmp_path / "records" / "one.parquet")
    assert [record["key"] for record in opened(tmp_path).all(LAYER)] == ["a"]
    table = pq.read_table(tmp_path / "records" / "one.parquet", partitioning=None)
    text = table.set_column(table.schema.get_field_index("w_error"), "w_error", pa.array(["small"]))
    for number, made in enumerate((text, table.drop_columns(["label"]))):
        folder = tmp_path / str(number) / "records"
        folder.mkdir(parents=True)
        pq.write_table(made, folder / "one.parquet")
        assert "ValueError" in opened(folder.parent).damaged[0]
    later = tmp_path / "later" / "records"
    later.mkdir(parents=True)
    metadata = {**table.schema.metadata, b"lowra.format": b"99"}
    pq.write_table(table.replace_schema_metadata(metadata), later / "one.parquet")
    assert "a later version of lowra" in opened(later.parent).damaged[0]


def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(layer("a", w_error=-5.0))
    store.append(layer("b", w_error=-6.0))
    (journal,) = (tmp_path / "records").iterdir()
    journal.write_bytes(journal.read_bytes().replace(b'"w_error":-6.0', b'"w_error":-9.0'))
    assert read([tmp_path]).layers["w_error"].tolist() == [-5.0]


def test_a_foreign_parquet_is_no_record_file(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(layer("a"))
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "records" / "mine.parquet")
    assert len(read([tmp_path]).layers) == 1


def test_a_folder_without_records_is_said(tmp_path: Path) -> None:
    with pytest.raises(LowraError, match=r"holds no records of a run; expected a folder such as runs/vit/mini"):
        read([tmp_path])


def test_checking_makes_and_leaves_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "b").check_writable()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(LowraError, match=r"Cannot write results to .*give another with results_dir=FOLDER"):
        Store(tmp_path / "file" / "b").check_writable()
    with pytest.raises(LowraError, match="File name too long"):
        Store(tmp_path / ("x" * 300)).check_writable()


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    store.append(layer("a"))

    def full(handle: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowra.records.os.write", full)
    with pytest.raises(LowraError, match=r"No space left on device.*1 records of this process are kept"):
        store.append(layer("b"))


def test_weights_wait_under_the_digest_of_their_bytes(tmp_path: Path) -> None:
    kept = Store(tmp_path).weights
    weight = torch.randn(4, 3)
    kept.keep("abc", weight)
    found = kept.get("abc")
    assert found is not None
    assert torch.equal(found, weight)
    assert kept.get("def") is None
    (tmp_path / "weights" / "bad.safetensors").write_bytes(b"cut")
    assert kept.get("bad") is None
    kept.drop(["abc", "bad", "gone"])
    assert not (tmp_path / "weights").exists()


# ---- Tables -----------------------------------------------------------------------------------------------------


def test_the_newest_variant_of_a_label_speaks_for_it(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for key in "ab":
        store.append(layer(key, layer_name=key))
    time.sleep(0.001)
    store.append(layer("c", layer_name="a", variant="v2", w_error=-9.0))  # edited code; one layer so far
    found = read([tmp_path])
    assert found.layers["w_error"].tolist() == [-9.0]  # never a mixture of both
    assert "2 records of older versions" in found.notes[0]
    assert read([tmp_path], ["a", "b"]).layers["w_error"].tolist() == [-5.0, -5.0]


def test_tables_do_not_depend_on_who_finished_what_first(tmp_path: Path) -> None:
    rows = [
        layer(f"{name}{trial}", layer_name=name, depth=int(name[-1]), trial=trial, w_error=-5 - 0.1 * int(name[-1]) / 3)
        for trial in range(2)
        for name in ("b.9", "a.10", "a.2", "c.3", "d.1", "a.7")
    ]
    read_back = []
    for place in (rows, rows[::-1], rows[1::2] + rows[::2]):
        store = opened(tmp_path / str(len(read_back)))
        for row in place:
            store.append(row)
        read_back.append(read([tmp_path / str(len(read_back))]))
    first, *others = read_back
    for other in others:
        times = ["finished", "folder"]
        pd.testing.assert_frame_equal(first.layers.drop(columns=times), other.layers.drop(columns=times))
        sums = [trials(part.layers, part.scores)["w_error"].tolist() for part in (first, other)]
        assert sums[0] == sums[1]  # to the last bit


def test_folders_add_up_and_count_common_records_once(tmp_path: Path) -> None:
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    one.append(layer("a"))
    two.append(layer("a"))
    two.append(layer("b"))
    found = read([tmp_path / "one", tmp_path / "two"])
    assert found.layers["key"].tolist() == ["a", "b"]
    assert found.layers["folder"].tolist() == [str(tmp_path / "one"), str(tmp_path / "two")]


def test_statistics_of_several_types_are_no_obstacle(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(layer("a", stats=dumps({"x": 1})))
    store.append(layer("b", stats=dumps({"x": "one"})))
    store.append(layer("c", stats=dumps({"x": None})))
    store.close()
    assert [str(x) for x in read([tmp_path]).layers["stat_x"]] == ["1", "one", "None"]


def scored(model: str, value: float, **fields: Any) -> dict[str, Any]:
    record = {"kind": SCORE, "key": f"{model}{value}", "metric": "sbert", "heading": "SBERT", "column": "sbert"}
    record |= {"settings": "{}", "values": dumps({"sbert": value}), "weights": [model], "base": "b", "inputs": "i"}
    return record | fields


def test_scores_are_joined_by_weights_and_averaged_over_candidates(tmp_path: Path) -> None:
    store = opened(tmp_path)
    rows = [layer("a", weights=["a0", "a1"], candidates=2), layer("b", weights=["b0", "b1"], candidates=2)]
    for row in rows:
        store.append(row)
    first, second = model_digest(rows, 0), model_digest(rows, 1)
    assert first != second
    assert first == model_digest(rows[::-1], 0)
    store.append(scored(str(first), -1.0))
    assert read([tmp_path]).scores.empty  # one candidate of two
    store.append(scored(str(second), -3.0))
    (row,) = read([tmp_path]).scores.to_dict("records")
    assert (row["value"], row["column"], row["heading"], row["trial"]) == (-2.0, "sbert", "SBERT", 0)
    table = trials(read([tmp_path]).layers, read([tmp_path]).scores)
    assert table["sbert"].tolist() == [-2.0]
    assert table["w_error"].tolist() == [-5.0]
    assert table["seconds"].tolist() == [0.5]


def test_what_a_metric_measures_beside_its_own_column_is_no_headline(tmp_path: Path) -> None:
    from lowra.reporting import write

    store = opened(tmp_path, caption="a test", title="ViT", models=["a", "b", "c"])
    store.append(layer("a"))
    model = str(model_digest([layer("a")], 0))
    # `sbert_std` is also what a table may call the deviation of `sbert`; the paper's are looked up by that name.
    setting = {"subset": "mistral_sft", "n_loras": 12, "method": "lora_ft"}
    store.append(layer("b", **setting, layer_name="b"))
    other = str(model_digest([layer("b", layer_name="b")], 0))
    for name in (model, other):
        store.append(scored(name, -1.0, values=dumps({"sbert": -1.0, "sbert_std": 0.5, "sbert_same": 1.0})))
    found = read([tmp_path])
    headline = found.scores.set_index("column")["headline"].groupby(level=0).all()
    assert headline.to_dict() == {"sbert": True, "sbert_std": False, "sbert_same": False}
    text = write(found, tmp_path, methods_order=None, figures=False)
    assert "SBERT" in text
    assert "sbert_std" not in text
    assert "sbert_std" in pd.read_parquet(tmp_path / "trials.parquet")


def test_a_score_of_other_weights_is_not_joined(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(layer("a"))
    store.append(scored("something else", -1.0))
    assert read([tmp_path]).scores.empty


def test_a_failed_layer_makes_a_draw_not_a_number(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(layer("a"))
    store.append(layer("b", failed=True, w_error=math.nan))
    (row,) = trials(read([tmp_path]).layers, read([tmp_path]).scores).to_dict("records")
    assert math.isnan(row["w_error"])
    assert (row["failed_layers"], row["layers"]) == (1, 2)


def test_history_is_a_table_of_its_own(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append(layer("a", history=dumps([{"loss": 2.0, "rank": 1.0}, {"loss": 1.0, "rank": 2.0}])))
    store.close()
    history = read([tmp_path]).history
    assert history[["layer_name", "step", "loss"]].to_numpy().tolist() == [["layer.a", 0, 2.0], ["layer.a", 1, 1.0]]


# ---- Many processes ---------------------------------------------------------------------------------------------


def _write(folder: str, start: int, count: int) -> None:
    store = opened(Path(folder), who=start)
    for i in range(start, start + count):
        store.append(layer(f"{i:05d}"))
    store.close()


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(str(tmp_path), 50 * i, 75)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(read([tmp_path]).layers) == 175  # 25 keys were written twice, each time by two of them


def test_a_killed_process_loses_no_finished_record(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from pathlib import Path; from test_records import *\n"
        "store = opened(Path(sys.argv[1]))\n"
        "for i in range(100000):\n"
        "    store.append(layer(f'{i:06d}')); print(i, flush=True)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    written = [int(process.stdout.readline()) for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    last = int(rest[-1]) if rest and rest[-1].isdigit() else written[-1]
    process.wait()
    found = read([tmp_path])
    keys = set(found.layers["key"])
    assert {f"{i:06d}" for i in range(last)} <= keys
    assert not found.notes
    assert (found.layers["w_error"] == -5.0).all()


def test_json_has_the_numbers_it_lacks() -> None:
    value = {"a": [math.nan, math.inf, {"b": -math.inf}], "c": "NaN"}
    back = loads(dumps(value))
    assert math.isnan(back["a"][0])
    assert back["a"][1:] == [math.inf, {"b": -math.inf}]
    assert back["c"] == "NaN"
