"""Packing on Apache Beam: the files of a local pack, from any runner, and errors in a sentence."""

import json
import subprocess
import sys

import pytest

from switch_jax.config.schema import DataConfig
from switch_jax.data.token_store import beam_pipeline
from switch_jax.data.token_store.build import build_token_store
from switch_jax.data.token_store.shards import write_shard
from switch_jax.data.vocabulary import ByteVocabulary
from switch_jax.errors import UserError
from switch_jax.files import as_path, download, file_names
from tests.support import runs
from tests.support.buckets import reachable_bucket
from tests.support.paths import file_contents
from tests.support.ports import free_port

pytestmark = pytest.mark.slow

SHARDS = 5
LOCAL = ["--runner=FnApiRunner"]  # Beam's own, in this process
TWO_WORKERS = [*LOCAL, "--direct_num_workers=2", "--direct_running_mode=multi_processing"]


@pytest.fixture(scope="module", autouse=True)
def one_file_per_shard():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switch_jax.data.sources.source._SHARD_BYTES", 1)
        yield


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Text in several files, each a shard, with a bad record."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(SHARDS):
        lines = [json.dumps({"text": f"document {k} of file {i}"}) for k in range(20)]
        (folder / f"train-{i}.jsonl").write_text("\n".join([*lines, "{"] if i == 3 else lines))
    (folder / "validation.jsonl").write_text('{"text": "validated"}\n')
    return f"{folder}/{{split}}*.jsonl"


@pytest.fixture(scope="module")
def packed(mixture, tmp_path_factory):
    """Files of the store that is packed without Beam, by path."""
    folder = tmp_path_factory.mktemp("packed") / "store"
    build_token_store(DataConfig(mixture=mixture), ByteVocabulary(), folder)
    return file_contents(folder)


@pytest.fixture(scope="module")
def job_server():
    """Address of a server that takes pipelines and runs them in the process that sends them."""
    address = f"localhost:{free_port()}"
    module = "apache_beam.runners.portability.local_job_service_main"
    command = [sys.executable, "-m", module, "--port", address.partition(":")[2]]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    yield address
    process.kill()
    process.wait()


def test_any_runner_packs_the_files_of_a_local_pack(mixture, packed, job_server, tmp_path):
    portable = ["--runner=PortableRunner", f"--job_endpoint={job_server}"]
    runners = (LOCAL, TWO_WORKERS, [*portable, "--environment_type=LOOPBACK"])
    assert len(packed) > 3 * SHARDS
    for number, options in enumerate(runners):
        output = tmp_path / str(number)
        build_token_store(
            DataConfig(mixture=mixture), ByteVocabulary(), output, beam_options=options
        )
        assert file_contents(output) == packed, options


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_workers_pack_into_a_bucket(mixture, packed, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCH_JAX_CACHE", str(tmp_path))
    with reachable_bucket(kind) as bucket:
        store, data = as_path(f"{bucket}/store"), DataConfig(mixture=mixture)
        build_token_store(data, ByteVocabulary(), store, beam_options=TWO_WORKERS)
        download(store, tmp_path / "copy", file_names(store))
    assert file_contents(tmp_path / "copy") == packed


def test_a_failed_pipeline_is_told_and_continued(mixture, packed, tmp_path, monkeypatch):
    data, written = DataConfig(mixture=mixture), []

    def failing(task, action):
        if len(written) == 2:
            raise OSError("the disk is gone")
        written.append(task)
        return write_shard(task, action)

    monkeypatch.setattr(beam_pipeline, "write_shard", failing)
    with pytest.raises(UserError, match=r"^The pipeline failed \(.*the disk is gone.*goes on"):
        build_token_store(data, ByteVocabulary(), tmp_path, beam_options=LOCAL)
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tokens")}
    assert len(before) == 2
    build_token_store(data, ByteVocabulary(), tmp_path, beam_options=LOCAL)
    assert file_contents(tmp_path) == packed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_no_pipeline_starts_where_all_shards_are_finished():
    refused = ["--runner=NoRunner"]
    assert list(beam_pipeline.write_shards_on_beam([], "skip", refused)) == []


def test_errors_of_workers_and_options_are_sentences(mixture, job_server, tmp_path):
    strict = DataConfig(mixture=mixture, on_bad_record="error")
    portable = ["--runner=PortableRunner", f"--job_endpoint={job_server}"]
    for number, (options, sentence) in enumerate(
        {
            tuple(LOCAL): r"^\S*train-3\.jsonl, line 21 is not a JSON object; .* leave such rec",
            (*portable, "--environment_type=LOOPBACK"): r"^\S*train-3\.jsonl, line 21 is not a",
            ("--runner=NoRunner",): r"^Beam refuses --runner=NoRunner \(.*change --runner",
            (*LOCAL, "--direct_num_workers=x"): r"^Beam refuses .*invalid int value: 'x'",
        }.items()
    ):
        with pytest.raises(UserError, match=sentence):
            build_token_store(
                strict, ByteVocabulary(), tmp_path / str(number), beam_options=options
            )


def test_workers_that_see_another_disk_are_told(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(beam_pipeline, "write_shard", lambda task, action: 0)
    with pytest.raises(UserError, match=r"ended without 6 shards, '.*00000\.json'.* same --output"):
        build_token_store(
            DataConfig(mixture=mixture), ByteVocabulary(), tmp_path, beam_options=LOCAL
        )


def test_flags_that_contradict_each_other_are_refused(mixture, tmp_path):
    command = ("data", "pack", "--config", "configs/switch_tiny.py", "--output", tmp_path / "store")
    for flags, sentence in {
        ("--pipeline_options=--region=r",): "name its --runner",
        ("--runner=DirectRunner", "--workers=2"): "leave it out",
    }.items():
        _, err = runs.run(*command, *flags, code=2)
        assert sentence in err and not (tmp_path / "store").exists()
