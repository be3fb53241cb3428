"""Ray Data: datasets equal to the single process, actors and jobs that die, what rows may hold.

One cluster of 2 CPUs on this machine serves all tests, with a small object store and no dashboard.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.helpers.snippets import Reader, blocks
from tests.helpers.stand_ins import ADDED, NOT_RUN, REPLACED, fill
from tests.helpers.waiting import PATIENCE
from w2vbert_fast.inference.jobs.job import Job
from w2vbert_fast.inference.jobs.results import read_results
from w2vbert_fast.inference.runner import Embedder, Flow, Runner, Transcriber
from w2vbert_fast.inference.tasks import Embed, Transcribe
from w2vbert_fast.inference.tasks.base import Piece
from w2vbert_fast.integrations import ray as ours
from w2vbert_fast.integrations.ray.actor import Actor, Actors, Columns
from w2vbert_fast.integrations.ray.runner import RayRunner
from w2vbert_fast.recordings.audio import load_audio
from w2vbert_fast.recordings.inputs import open_inputs

INSTALL = "needs pip install 'w2vbert_fast[ray]'"
pa = pytest.importorskip("pyarrow", reason=INSTALL)
pq = pytest.importorskip("pyarrow.parquet", reason=INSTALL)

ROOT = Path(__file__).resolve().parents[2]
CLIPS = sorted(
    [*(ROOT / "tests/data").glob("*.flac"), *(ROOT / "w2vbert_fast/demo/samples").glob("*.flac")]
)
FLOW = Flow(frame_budget=1000, workers=1)
NO_CPUS = Actors(num_cpus=0.0, rows_per_shard=6)
SHARED = {"flow": FLOW, "num_cpus": 0.0, "rows_per_shard": 6}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """`ray`, connected to a cluster of its own, of which nothing is left afterwards."""
    module = pytest.importorskip("ray", reason=INSTALL)
    # The path of a socket below it must not be longer than 107 bytes.
    temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    with temporary as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        # A token of its own: Ray would write one into the home folder. It sets the mode itself.
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.setenv("RAY_AUTH_MODE", "")
        patch.delenv("RAY_AUTH_MODE")
        module.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        module.data.DataContext.get_current().enable_progress_bars = False
        started = psutil.Process().children(recursive=True)
        yield module
        started += psutil.Process().children(recursive=True)
        module.shutdown()
        _, alive = psutil.wait_procs(started, PATIENCE)
    assert not alive


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows with clips and with what is none."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "notes.wav").write_text("these are notes\n")
    (folder / "empty.wav").touch()
    paths = [*CLIPS, *CLIPS, folder / "missing.wav", folder / "notes.wav", folder / "empty.wav"]
    paths[3], paths[-1] = paths[-1], paths[3]
    return [
        {"key": f"row-{i:02d}", "audio_filepath": str(path), "text": path.stem, "speaker": i % 3}
        for i, path in enumerate(paths)
    ]


@dataclass
class Fragile(Transcribe):
    """Kills its actor once, and fails as long as there is a file `broken` and something is done."""

    folder: str = ""

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        folder = Path(self.folder)
        with (folder / "batches").open("a") as log:
            log.write(f"{os.getpid()}\n")
        number = len((folder / "batches").read_text().split())
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number >= 5 and (folder / "broken").exists():
            while not committed(folder / "out"):
                time.sleep(0.05)
            raise RuntimeError("this device is broken")
        return super().run(pieces)


def committed(out: Path) -> list[Path]:
    """What Ray Data notes of complete files."""
    found = (out / "_checkpoint").glob("*.parquet")
    return sorted(path for path in found if ".pending" not in path.name)


def batches(folder: Path) -> int:
    return len((folder / "batches").read_text().split())


def test_the_blocks_of_the_page(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/use/scaling.md, with two clips and a cluster of two CPUs."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    clips = [json.loads(line) for line in Path("corpus.jsonl").read_text().splitlines()]
    rows = [{"id": clip["id"], "audio_filepath": clip["audio"]} for clip in clips]
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus" / "0.parquet")
    (tmp_path / "shards").rename(tmp_path / "clips")
    places = {"s3://bucket": str(tmp_path), "/shared": str(tmp_path)}
    places["me/my-model"] = str(tmp_path / "hf-audio/wav2vec2-bert-CV16-en")
    page = ROOT / "docs" / "use" / "scaling.md"
    Reader({**REPLACED, **places}, ADDED, NOT_RUN).read(blocks(page), apart=False)
    said = {clip["id"]: clip["text"] for clip in clips}
    written = pq.read_table(tmp_path / "transcripts" / "rows").to_pylist()
    assert {row["id"]: row["text"] for row in written} == said
    assert {row["id"]: row["text"] for row in read_results("out")} == said
    assert pq.read_table(tmp_path / "clips_parquet").num_rows == 1


def test_a_killed_actor_loses_nothing_and_a_failed_job_goes_on(
    ray: Any, manifest: list[dict[str, Any]], tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist(manifest), tmp_path / "in.parquet")
    (tmp_path / "broken").touch()
    out = tmp_path / "out"

    def run() -> None:
        actors = NO_CPUS
        task = Fragile(timestamps="word", folder=str(tmp_path))
        rows = ray.data.read_parquet(str(tmp_path / "in.parquet"))
        # Every shard is one batch.
        flow = Flow(frame_budget=100_000, workers=1)
        ours.write_dataset(
            ours.map_dataset(rows, task, Columns(), actors, flow), out, id_column="key"
        )

    with pytest.raises(Exception, match="broken"):
        run()
    assert len(set((tmp_path / "batches").read_text().split())) > 1  # another actor took over
    done = {path: path.read_bytes() for path in sorted((out / "rows").iterdir())}
    done = {path: content for path, content in done.items() if complete(path, out)}
    rows_done = sum(pq.read_metadata(path).num_rows for path in done)
    assert 0 < rows_done < len(manifest)

    (tmp_path / "broken").unlink()
    before = batches(tmp_path)
    run()
    # Shards that were done are not done again.
    assert batches(tmp_path) - before < -(-len(manifest) // 6)
    assert {path: path.read_bytes() for path in done} == done
    table = pq.read_table(out / "rows").to_pylist()
    assert sorted(row["key"] for row in table) == [row["key"] for row in manifest]

    expected = Transcriber("demo", flow=FLOW, timestamps="word", device="cpu")
    paths = [row["audio_filepath"] for row in manifest]
    by_key = {row["key"]: row for row in table}
    for given, result in zip(manifest, expected(paths), strict=True):
        row = by_key[given["key"]]
        assert row["input_text"] == given["text"] and row["speaker"] == given["speaker"]
        assert row["audio_filepath"] == given["audio_filepath"]
        assert (row["text"], row["seconds"]) == (result.text, result.seconds)
        assert (row["error_type"], row["error"]) == (result.error_type, result.error)
        found = [(w["word"], w["start"], w["end"]) for w in row["words"] or ()]
        assert found == [(w.text, round(w.start, 3), round(w.end, 3)) for w in result.words or ()]
    assert sum(row["error"] is not None for row in table) == 3


def complete(path: Path, out: Path) -> bool:
    return any(path.name.startswith(found.stem) for found in committed(out))


def test_files_that_ray_reads_become_embeddings(ray: Any) -> None:
    paths = [str(path) for path in CLIPS[:4]]
    rows = ray.data.read_binary_files(paths, include_paths=True)
    options: dict[str, Any] = {"pool": "mean", "layer": 2}
    found = ours.embed_dataset(rows, "demo", audio="bytes", **SHARED, **options).take_all()
    assert sorted(row["path"] for row in found) == sorted(paths)
    expected = {
        path: result.embedding
        for path, result in zip(paths, Embedder("demo", flow=FLOW, **options)(paths), strict=True)
    }
    for row in found:
        assert "bytes" not in row
        embedding = expected[row["path"]]
        assert embedding is not None
        torch.testing.assert_close(torch.tensor(row["embedding"]), embedding, rtol=1e-4, atol=1e-5)


def test_a_job_with_ray_writes_what_one_without_writes(
    ray: Any, manifest: list[dict[str, Any]], tmp_path: Path
) -> None:
    inputs = open_inputs([row["audio_filepath"] for row in manifest])
    task = Transcribe("demo", timestamps="word")
    formats = ("parquet", "srt")
    Job(Runner(task, FLOW), inputs, tmp_path / "one", formats).run()
    runner = ours.job_runner(task, FLOW, num_cpus=0.0, concurrency=1, rows_per_shard=6)
    summary = Job(runner, inputs, tmp_path / "ray", formats).run()
    assert summary.rows == len(manifest) and sum(summary.errors.values()) == 3
    tables = [
        sorted(read_results(tmp_path / name), key=lambda row: row["index"])
        for name in ("one", "ray")
    ]
    # Of two files of one recording, the one that is there first has its name: with Ray, either.
    for name, rows in zip(("one", "ray"), tables, strict=True):
        files = [row["srt_file"] for row in rows if "srt_file" in row]
        assert len({*files}) == len(files) == len(manifest) - 3
        for row in rows:
            if "srt_file" in row:
                row["srt_file"] = (tmp_path / name / row["srt_file"]).read_text()
    assert tables[0] == tables[1]
    # There is nothing left to do, and no actor is started for it.
    again = ours.job_runner(task, FLOW, num_cpus=0.0, concurrency=1)
    assert Job(again, inputs, tmp_path / "ray", formats).run().content["this_run"]["rows"] == 0


def command(*arguments: Any) -> Any:
    """Run `w2vbert-fast` in this process."""
    from typer.testing import CliRunner

    from w2vbert_fast.cli import app as cli

    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])


def test_the_command_line_embeds_with_ray(ray: Any, tmp_path: Path) -> None:
    usual = ["embed", *CLIPS[:3], "--model", "demo", "--format", "npy"]
    local = command(*usual, "--out", tmp_path / "one")
    assert local.exit_code == 0, local.output
    there = ["--engine", "ray", "--actors", "1:2", "--cpus-per-actor", "0"]
    found = command(*usual, "--out", tmp_path / "ray", *there)
    assert found.exit_code == 0, found.output
    assert "3 rows" in found.output
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.npy"))
    assert len(names) == 3
    for name in names:
        one, other = np.load(tmp_path / "one" / name), np.load(tmp_path / "ray" / name)
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "spark"], "--engine must be local or ray, got 'spark'"),
        (["--actors", "2"], "--actors is for --engine ray"),
        (["--gpus-per-actor", "1"], "--gpus-per-actor is for --engine ray"),
        (["--engine", "ray", "--device", "cuda"], "--device is for --engine local"),
        (["--engine", "ray", "--processes", "2"], "--processes is for --engine local"),
        (["--engine", "ray", "--actors", "1:2:3"], "--actors must be a number or MIN:MAX"),
        (["--engine", "ray", "--actors", "many"], "--actors must be a number or MIN:MAX"),
    ],
)
def test_wrong_options_of_the_command_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = command("transcribe", CLIPS[0], "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_cannot_be_restarted_is_refused(ray: Any, tmp_path: Path) -> None:
    rows = ours.transcribe_dataset(ray.data.from_items([{"audio": str(CLIPS[0])}]), **SHARED)
    with pytest.raises(ValueError, match="must come from files"):
        ours.write_dataset(rows, tmp_path / "out", id_column="id")
    assert not (tmp_path / "out").exists()


def test_a_cluster_without_enough_cpus_is_pointed_out(ray: Any) -> None:
    rows = ray.data.range(1)
    with pytest.warns(UserWarning, match="the cluster has 2 CPUs; 3 actors with num_cpus=1"):
        Actors(concurrency=(3, 4)).map(rows, Actor)


def test_a_missing_column_is_found_before_anything_runs(ray: Any) -> None:
    with pytest.raises(ValueError, match="needs a column wav; it has file"):
        ours.transcribe_dataset(
            ray.data.from_items([{"file": "a.wav"}]).materialize(), audio="wav", **SHARED
        )


def actor(columns: Columns | None = None, **options: Any) -> Actor:
    return Actor(Transcribe("demo", device="cpu", **options), FLOW, columns or Columns(), Actors())


def text_of(path: Path) -> str | None:
    (result,) = Transcriber("demo", flow=FLOW, device="cpu")([path])
    return result.text


def test_recordings_come_in_every_form() -> None:
    path = CLIPS[0]
    content = path.read_bytes()
    samples = load_audio(path).samples.numpy()
    twice = np.repeat(samples, 2)
    floats = pa.list_(pa.float32())
    array = pa.struct([("array", floats), ("sampling_rate", pa.int64())])
    stored = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns: dict[str, Any] = {
        "path": pa.array([str(path)]),
        "bytes": pa.array([content], pa.binary()),
        "large": pa.array([content], pa.large_binary()),
        "stored": pa.array([{"bytes": content, "path": "a.flac"}], stored),
        "named": pa.array([{"bytes": None, "path": str(path)}], stored),
        "samples": pa.array([samples], floats),
        "pcm": pa.array([(samples * 32768).round().astype(np.int16)], pa.list_(pa.int16())),
        "array": pa.array([{"array": twice, "sampling_rate": 32_000}], array),
    }
    expected = text_of(path)
    assert expected
    for name, column in columns.items():
        table = pa.table({"other": [1], name: column})
        (found,) = actor(Columns(audio=name))(table)
        (row,) = found.to_pylist()
        assert row["error"] is None and row["text"] == expected, name
        assert (name in row) == (name == "path"), name
    (kept,) = actor(Columns(audio="bytes", keep_audio=True))(pa.table({"bytes": columns["bytes"]}))
    assert kept["bytes"][0].as_py() == content


def test_tensors_of_ray_are_samples() -> None:
    pytest.importorskip("ray", reason=INSTALL)
    from ray.data.extensions import ArrowTensorArray, ArrowVariableShapedTensorArray

    samples = [load_audio(path).samples.numpy() for path in CLIPS[:2]]
    expected = [text_of(path) for path in CLIPS[:2]]
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    ragged = pa.table(
        {
            "audio": ArrowVariableShapedTensorArray.from_numpy(samples),
            "vector": ArrowTensorArray.from_numpy(vectors),
        }
    )
    (found,) = actor()(ragged)
    texts = {int(row["vector"][0]): row["text"] for row in found.to_pylist()}
    assert texts == {0: expected[0], 3: expected[1]}
    (found,) = actor()(pa.table({"audio": ArrowTensorArray.from_numpy(samples[0][None])}))
    assert found["text"].to_pylist() == expected[:1]


def test_the_sampling_rate_is_that_of_the_samples_or_of_the_dataset() -> None:
    samples = pa.array([[0.0] * 100], pa.list_(pa.float32()))
    stated = pa.array([{"array": [0.0] * 100, "sampling_rate": 8000}])

    def rate(columns: Columns, **table: Any) -> int | None:
        (row,) = columns.rows(pa.table(table))
        return row.sampling_rate

    assert rate(Columns(), audio=samples) == 16_000
    assert rate(Columns(), audio=samples, sampling_rate=[44_100]) == 44_100
    assert rate(Columns(sampling_rate=22_050), audio=samples, sampling_rate=[44_100]) == 22_050
    assert rate(Columns(sampling_rate=22_050), audio=stated, sampling_rate=[44_100]) == 8_000


def test_parts_of_files_and_cells_that_are_no_recordings() -> None:
    table = pa.table(
        {
            "audio_filepath": [str(CLIPS[0]), None, "", str(CLIPS[0])],
            "offset": [0.5, 0.0, 0.0, -1.0],
            "duration": [0.75, None, None, None],
        }
    )
    (found,) = actor()(table)
    rows = {(row["audio_filepath"], row["offset"]): row for row in found.to_pylist()}
    assert len(rows) == 4
    assert rows[str(CLIPS[0]), 0.5]["seconds"] == pytest.approx(0.75, abs=1e-3)
    for key in ((None, 0.0), ("", 0.0), (str(CLIPS[0]), -1.0)):
        assert rows[key]["error_type"] == "ManifestError" and rows[key]["text"] is None
    assert pa.types.is_string(found.schema.field("text").type)


def test_embeddings_come_in_tables_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from w2vbert_fast.integrations.ray import actor as _ray_actor

    monkeypatch.setattr(_ray_actor, "BYTES_PER_TABLE", 1)
    table = pa.table({"audio": [str(CLIPS[0]), "missing.wav", str(CLIPS[1])], "n": [0, 1, 2]})
    task = Embed("demo", device="cpu", embedding_dtype="float16")
    found = list(Actor(task, FLOW, Columns(), Actors())(table))
    assert len(found) > 1 and len({part.schema for part in found}) == 1
    rows = {row["n"]: row for part in found for row in part.to_pylist()}
    assert rows[1]["embedding"] is None and rows[1]["error_type"] == "FileNotFoundError"
    expected = Embedder("demo", flow=FLOW, device="cpu", embedding_dtype="float16")
    for number, result in zip((0, 2), expected([CLIPS[0], CLIPS[1]]), strict=True):
        assert result.embedding is not None
        embedding = torch.tensor(np.array(rows[number]["embedding"], np.float16))
        torch.testing.assert_close(embedding, result.embedding, rtol=2e-3, atol=2e-3)


def test_two_columns_of_one_name_are_refused() -> None:
    table = pa.table({"audio": ["a.wav"], "text": ["a"], "input_text": ["b"]})
    with pytest.raises(ValueError, match="two columns for 'input_text'"):
        list(actor()(table))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpus": 2}, "num_gpus must be at most 1, got 2"),
        ({"num_gpus": -0.5}, "num_gpus must be at least 0, got -0.5"),
        ({"num_cpus": float("nan")}, "num_cpus must be at least 0, got nan"),
        ({"concurrency": 0}, "concurrency must be .* got 0"),
        ({"concurrency": (3, 2)}, r"concurrency must be .* got \(3, 2\)"),
        ({"rows_per_shard": 0}, "rows_per_shard must be at least 1, got 0"),
    ],
)
def test_impossible_numbers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Actors(**arguments)


def test_impossible_options_are_refused(ray: Any, tmp_path: Path) -> None:
    rows = ray.data.from_items([{"audio": "a.wav"}])
    with pytest.raises(TypeError, match="tempo"):
        ours.transcribe_dataset(rows, tempo=2)
    with pytest.raises(ValueError, match="device is 'cuda', but actors with num_gpus=0"):
        ours.transcribe_dataset(rows, device="cuda", **SHARED)
    with pytest.raises(ValueError, match="sampling_rate must be positive, got 0"):
        ours.transcribe_dataset(rows, sampling_rate=0, **SHARED)
    with pytest.raises(ValueError, match="file_format must be"):
        ours.write_dataset(rows, tmp_path, id_column="id", file_format="csv")


def test_a_job_with_ray_takes_names_only() -> None:
    pytest.importorskip("ray", reason=INSTALL)
    from w2vbert_fast.recordings.rows import Row

    runner = RayRunner(Transcribe("demo"), FLOW, NO_CPUS)
    with pytest.raises(ValueError, match="takes names of recordings, not tar files"):
        list(runner.windows([Row(0, b"RIFF", "a.wav", "a.wav")]))
    assert list(runner.windows([])) == []


@pytest.mark.parametrize(
    "function", [ours.transcribe_dataset, ours.embed_dataset, ours.classify_dataset]
)
def test_the_functions_show_their_arguments(function: Any) -> None:
    documented = re.findall(r"^        (\w+): ", ours.transcribe_dataset.__doc__ or "", re.M)
    parameters = inspect.signature(function).parameters
    assert documented[: len(parameters) - 1] == list(parameters)[:-1]
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
    with pytest.raises(TypeError, match="unexpected keyword argument 'tempo'"):
        function(None, tempo=2)


def test_without_ray_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    hint = r"ray is not installed.*w2vbert_fast\[ray\]"
    with pytest.raises(ImportError, match=hint):
        ours.transcribe_dataset(None)
    with pytest.raises(ImportError, match=hint):
        ours.write_dataset(None, tmp_path, id_column="id")
    with pytest.raises(ImportError, match=hint):
        ours.job_runner(Transcribe("demo"))
