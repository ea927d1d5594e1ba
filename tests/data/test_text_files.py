"""Text files of every format: good texts are read, bad records counted, damage detected."""

import gzip
import io
import json
import sys
import time
import tracemalloc
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import pyarrow as pa
import pytest
import zstandard
from etils.epath import backend
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from switch_jax.data.sources import compression, plain_text, record_files, tfrecord
from switch_jax.data.sources.bad_records import (
    DAMAGED,
    EMPTY,
    MISSING,
    NO_TEXT,
    NOT_EXAMPLE,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    BadRecords,
)
from switch_jax.data.sources.plain_text import split_text
from switch_jax.data.sources.text_files import is_text_file, read_texts
from switch_jax.data.sources.tfrecord import _example_class
from switch_jax.errors import UserError
from switch_jax.files import untrusted

LINES = ["a.json", "a.json.gz", "a.jsonl.zst", "a.ndjson", "c4-sw.tfrecord-00000-of-00064.json.gz"]
RECORDS = ["a.tfrecord", "a.tfrecord.gz", "c4-train.tfrecord-00000-of-00004"]
NAMES = [*LINES, "a.txt", "a.txt.gz", "a.txt.zst", *RECORDS, "a.parquet"]
TEXTS = [f"text number {i}, {'é' * i}" for i in range(12)]


def read_file(path, action="skip"):
    bad = BadRecords(action)
    return list(read_texts(str(path), bad)), bad


def compress(name, data):
    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    checked = zstandard.ZstdCompressor(write_checksum=True)
    return checked.compress(data) if name.endswith(".zst") else data


def masked_crc(data):
    crc = google_crc32c.value(data)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def tfrecord_bytes(data):
    length = len(data).to_bytes(8, "little")
    return length + masked_crc(length) + data + masked_crc(data)


def example_bytes(**features):
    example = _example_class()()
    for name, values in features.items():
        example.features.feature.add(key=name.encode()).value.bytes_list.value.extend(values)
    return example.SerializeToString()


def file_bytes(name, texts):
    if "json" in name:
        data = "".join(json.dumps({"url": "", "text": t}) + "\n" for t in texts).encode()
    elif ".txt" in name:
        data = "".join(f"{t}\n\n" for t in texts).encode()
    elif ".tfrecord" in name:
        data = b"".join(tfrecord_bytes(example_bytes(url=[b""], text=[t.encode()])) for t in texts)
    else:
        file = io.BytesIO()
        parquet.write_table(pa.table({"url": [""] * len(texts), "text": texts}), file)
        data = file.getvalue()
    return compress(name, data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(params=[None, 5], ids=["default pieces", "small pieces"])
def pieces(request, monkeypatch):
    if request.param:
        for module in (compression, record_files, tfrecord):
            monkeypatch.setattr(module, "_BLOCK_BYTES", 3 * request.param)
        monkeypatch.setattr(compression, "_PIECE_BYTES", request.param)


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")
lines = st.text(letters, min_size=1).filter(lambda line: line.strip())
documents = st.lists(lines, min_size=1, max_size=4).map("\n".join)


@pytest.mark.parametrize("name", NAMES)
@given(texts=st.lists(documents, max_size=5), part=st.sampled_from([3, 8, 2**20]))
def test_every_format_gives_the_same_texts(folder, name, texts, part):
    (folder / name).write_bytes(file_bytes(name, texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "PART_CHARACTERS", part)
        parts, _ = read_file(folder / name, "error")
    assert parts == texts or part < 2**20
    assert "".join(parts) == "".join(texts) and all(0 < len(p) <= part for p in parts)


@given(text=st.text("ab \n\u2003é"), part=st.integers(1, 9))
def test_parts_end_in_whitespace_if_they_contain_any(text, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "PART_CHARACTERS", part)
        parts = list(split_text(text))
    assert "".join(parts) == text
    for p in parts[:-1]:
        assert p[-1].isspace() or (len(p) == part and not any(map(str.isspace, p)))


def test_file_names_decide_the_format():
    for name in (*NAMES, "gs://b/c4-train.00000-of-01024.json.gz", "x.parquet-00000-of-00001"):
        assert is_text_file(name)
    for name in ("a", "a.doc", "a.json.rar", "a.parquet.gz", "a.txt~", "a.tfrecord.tmp", "x.txt/a"):
        assert not is_text_file(name)
    with pytest.raises(UserError, match=r"a\.doc has no known format"):
        read_file("a.doc")


# Content, the good texts, how many are bad, and where the first of each kind is.
BAD_LINES = (
    b'\xef\xbb\xbf{"text": "\xc3\xa9"}\r\n{"text": " \\n"}\n{"text": "\xe9"}\n[1]\nnope\n{"a": 1}\n'
    b'{"text": null}\n{"text": ["x"]}\n{"text": "\\ud83d"}\n\n \r\n'
    + b'{"text": %b}\n{"text": %b}\n{"text": "two", "b": 2}'
    % (b"[" * 10**5, b"1" * 5000),
    ["é", "two"],
    {EMPTY: 1, NOT_UTF8: 2, NOT_JSON: 4, NO_TEXT: 3},
    {EMPTY: "line 2", NOT_UTF8: "line 3", NOT_JSON: "line 4", NO_TEXT: "line 6 (it has 'a')"},
)
BAD_TEXT = (
    b"\xef\xbb\xbf\n \n1\r\n  2\r\n\r\n\n\nb\xe9d\n\xff\nfine but of it\n\t\nlast \xc3\xa9 \n ",
    ["1\n  2", "last é "],
    {NOT_UTF8: 1},
    {NOT_UTF8: "line 8"},
)
_BAD_EXAMPLES = ([b"one"], [b"  "], [b"\xff"], [], [b"a", b"b"], ["é".encode()])
BAD_RECORDS = (
    b"".join(tfrecord_bytes(example_bytes(url=[b"\xff"], text=values)) for values in _BAD_EXAMPLES)
    + tfrecord_bytes(example_bytes(url=[b"x"]) + b"")
    + tfrecord_bytes(b"\xff"),
    ["one", "é"],
    {EMPTY: 1, NOT_UTF8: 1, NO_TEXT: 3, NOT_EXAMPLE: 1},
    {EMPTY: "record 2", NOT_UTF8: "record 3", NO_TEXT: "record 4", NOT_EXAMPLE: "record 8"},
)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "name, case", [("a.json", BAD_LINES), ("a.txt", BAD_TEXT), ("a.tfrecord", BAD_RECORDS)]
)
def test_bad_records_are_counted_and_good_ones_read(tmp_path, name, case, suffix):
    data, good, counts, first = case
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(compress(path.name, data))
    texts, bad = read_file(path)
    assert texts == good and bad.counts == counts
    assert bad.first == {kind: f"{path}, {place}" for kind, place in first.items()}
    kind, place = next(iter(first.items()))
    refusing = read_texts(str(path), BadRecords("error"))
    with pytest.raises(UserError, match=f"{place} is {kind}; .* set data.on_bad_record=skip"):
        for text in [*good[:1], None]:
            assert next(refusing) == text


def test_bad_parquet_rows_are_counted_and_good_ones_read(tmp_path):
    path = tmp_path / "a.parquet"
    binary = pa.array([b"one", None, b"\xff", b" ", b"two"])
    unchecked = pa.Array.from_buffers(pa.string(), 5, binary.buffers())
    for column in (binary, unchecked, binary.cast(pa.large_binary()).dictionary_encode()):
        parquet.write_table(pa.table({"text": column}), path)
        texts, bad = read_file(path)
        assert texts == ["one", "two"]
        assert bad.counts == {NO_TEXT: 1, NOT_UTF8: 1, EMPTY: 1}
        assert bad.first[NOT_UTF8] == f"{path}, row 3"
    for columns in ({"text": [1, 2, 3]}, {"text": [["a"]] * 3}, {"txt": ["a", "b", "c"]}):
        parquet.write_table(pa.table(columns), path)
        texts, bad = read_file(path)
        assert texts == [] and bad.counts == {NO_TEXT: 3}
        assert bad.first == {NO_TEXT: f"{path}, row 1"}


def test_a_damaged_row_group_does_not_affect_other_row_groups(tmp_path):
    path, texts = tmp_path / "a.parquet", [f"text {i}" for i in range(299)]
    pages = dict(data_page_size=64, write_batch_size=10, write_page_checksum=True)
    rows = pa.table({"text": [*texts, " "]})
    parquet.write_table(
        rows, path, row_group_size=100, compression="none", use_dictionary=False, **pages
    )
    data = bytearray(path.read_bytes())
    data[data.index(b"text 185")] ^= 1
    path.write_bytes(data)
    found, bad = read_file(path)
    # Row group 2 is read up to the damaged batch of 64 rows, which begins at row 165.
    assert found == texts[:164] + texts[200:] and bad.counts == {DAMAGED: 1, EMPTY: 1}
    assert bad.first == {DAMAGED: f"{path}, row 165", EMPTY: f"{path}, row 300"}
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        assert read_file(path)[1].counts == {DAMAGED: 1}


def test_examples_and_bucket_files_of_tensorflow_are_read(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    path, kind = tmp_path / RECORDS[-1], tf.train.Feature
    with tf.io.TFRecordWriter(str(path)) as file:
        for i, text in enumerate(TEXTS):
            values = {
                "id": kind(int64_list=tf.train.Int64List(value=[i])),
                "text": kind(bytes_list=tf.train.BytesList(value=[text.encode()])),
                "score": kind(float_list=tf.train.FloatList(value=[0.5, i])),
            }
            features = tf.train.Features(feature=values)
            file.write(tf.train.Example(features=features).SerializeToString())
    assert read_file(path, "error")[0] == TEXTS

    def bucket(path):  # what etils opens where there is TensorFlow
        return types.SimpleNamespace(open=lambda mode: backend.tf_backend.open(path, mode))

    monkeypatch.setattr(record_files.epath, "Path", bucket)
    for name in NAMES:
        assert read_file(tmp_path / f"none-{name}")[1].counts == {MISSING: 1}
        (tmp_path / name).write_bytes(file_bytes(name, TEXTS))
        assert read_file(tmp_path / name, "error")[0] == TEXTS


def test_damaged_gzip_files_are_read_up_to_the_damaged_piece(tmp_path, pieces):
    path = tmp_path / "a.json.gz"
    data = file_bytes(path.name, TEXTS)

    def count_lines(size):
        return zlib.decompressobj(31).decompress(data[:size]).count(b"\n")

    for i in range(len(data)):
        lines = count_lines(i)
        path.write_bytes(data[:i])
        found, bad = read_file(path)
        assert found == TEXTS[:lines] and bad.counts == {DAMAGED: 1}
        assert bad.first == {DAMAGED: f"{path}, line {lines + 1}"}
        lines = count_lines(i - i % compression._PIECE_BYTES)
        for flip in (1, 64, 255):
            path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
            found, bad = read_file(path)
            assert found[:lines] == TEXTS[:lines] and (DAMAGED in bad.counts or found == TEXTS)


@pytest.mark.parametrize("name", ["a.json.zst", "a.txt.zst", "a.txt.gz", "a.tfrecord.zst"])
def test_members_and_frames_before_damage_are_read(tmp_path, pieces, name):
    path = tmp_path / name
    first, second = file_bytes(name, TEXTS[:6]), file_bytes(name, TEXTS[6:])
    path.write_bytes(first + second)
    assert read_file(path, "error")[0] == TEXTS
    for i in range(len(second)):
        path.write_bytes(first + second[:i])
        found, bad = read_file(path)
        assert found == TEXTS[: max(6, len(found))] and bad.counts == ({DAMAGED: 1} if i else {})
        path.write_bytes(first + second[:i] + bytes([second[i] ^ 1]) + second[i + 1 :])
        found, bad = read_file(path)
        assert found[:6] == TEXTS[:6] and (DAMAGED in bad.counts or found == TEXTS)


def test_padding_after_a_gzip_member_is_skipped_and_other_bytes_are_damage(tmp_path, pieces):
    path = tmp_path / "a.json.gz"
    data = file_bytes(path.name, TEXTS)
    path.write_bytes(data + b"\0" * 20 + data + b"\0" * 2000)
    assert read_file(path, "error")[0] == TEXTS * 2
    path.write_bytes(data + b"garbage")
    found, bad = read_file(path)
    assert found == TEXTS and bad.counts == {DAMAGED: 1}


def test_only_damaged_tfrecords_are_lost(tmp_path, pieces):
    path = tmp_path / "a.tfrecord"
    records = [file_bytes(path.name, [text]) for text in TEXTS[:5]]
    data = b"".join(records)
    place = [(k, i) for k, record in enumerate(records) for i in range(len(record))]
    for i, (k, within) in enumerate(place):
        path.write_bytes(data[:i])
        found, bad = read_file(path)
        assert found == TEXTS[:k] and bad.counts == ({DAMAGED: 1} if within else {})
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        found, bad = read_file(path)
        assert found == TEXTS[:k] + (TEXTS[k + 1 : 5] if within >= 12 else [])
        assert bad.counts == {DAMAGED: 1} and bad.first == {DAMAGED: f"{path}, record {k + 1}"}


@pytest.mark.parametrize("name", ["a.json", "a.tfrecord"])
def test_too_long_records_are_skipped(tmp_path, monkeypatch, name):
    path, size = tmp_path / name, len(file_bytes(name, ["é"])) - 16 * (name == "a.tfrecord")
    for module in (record_files, tfrecord):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", size)
        monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
    path.write_bytes(file_bytes(name, ["a", "b" * 999, "é", "éa", "e", "f" * 999]))
    found, bad = read_file(path)
    assert found == ["a", "é", "e"] and bad.counts == {TOO_LONG: 3}
    assert bad.first[TOO_LONG].endswith(" 2")
    if name == "a.tfrecord":
        path.write_bytes(path.read_bytes()[:-1])
        assert read_file(path)[1].counts == {TOO_LONG: 2, DAMAGED: 1}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_row_without_an_end_is_not_read_into_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(record_files, "MAX_RECORD_BYTES", 100)
    endless = b'"b\n",' * 99 if name == "a.csv" else b"b" * 999
    (tmp_path / name).write_bytes(b"x\n" + b"a" * 60 + b"\n" + b"a" * 60 + b"\n" + endless)
    *rows, last = record_files.read_records(str(tmp_path / name))
    assert [row.fields for row in rows] == [{"x": "a" * 60}] * 2
    assert last == (DAMAGED, f"{tmp_path / name}, record 3")


def test_a_file_that_expands_absurdly_is_refused_with_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "_ALWAYS_ALLOWED_BYTES", 2**20)
    data = zstandard.ZstdCompressor(level=1).compress(bytes(2**25))
    (tmp_path / "a.txt.zst").write_bytes(data)
    expected = rf"a\.txt\.zst expands to [\d,]+ bytes, and its files have {len(data):,};"
    with pytest.raises(UserError, match=expected):
        read_file(tmp_path / "a.txt.zst")


@pytest.mark.parametrize("name", ["a.json.zst", "a.txt.zst", "a.tfrecord.zst"])
def test_memory_is_bounded(tmp_path, monkeypatch, name):
    monkeypatch.setattr(record_files, "MAX_RECORD_BYTES", 2**20)
    length = (300 * 2**20).to_bytes(8, "little")
    begin, end = (length + masked_crc(length), b"crc.") if "tfrecord" in name else (b"", b"\n\n")
    compressor = zstandard.ZstdCompressor().compressobj()
    with open(tmp_path / name, "wb") as file:
        for data in (begin, *[b"x" * 2**20] * 300, end + file_bytes(name[:-4], ["end"])):
            file.write(compressor.compress(data))
        file.write(compressor.flush())
    bad = BadRecords("skip")
    tracemalloc.start()
    count = sum(map(len, read_texts(str(tmp_path / name), bad)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3 + 300 * 2**20 * (".txt" in name)
    assert bad.counts == ({} if ".txt" in name else {TOO_LONG: 1})
    assert peak < 100e6


def test_bytes_that_are_not_utf8_end_a_long_document(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_text, "PART_CHARACTERS", 4)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one two \xff three\nfour\n\nsix")
    found, bad = read_file(path)
    assert found == ["one ", "six"] and bad.counts == {NOT_UTF8: 1}
    assert bad.first == {NOT_UTF8: f"{path}, line 1"}


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_unreadable_files_are_counted(tmp_path, monkeypatch, name):
    path = tmp_path / name
    for _ in range(2):
        texts, bad = read_file(path)
        assert texts == [] and bad.counts == {MISSING: 1} and bad.first == {MISSING: str(path)}
        path.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=f"{name} is missing or unreadable"):
        read_file(path, "error")

    def no_backend(path):
        raise ImportError("install gcsfs")

    monkeypatch.setattr(record_files.epath, "Path", no_backend)
    with pytest.raises(UserError, match=f"gs://b/{name} needs a package .* install gcsfs"):
        read_file(f"gs://b/{name}")


@pytest.mark.parametrize(
    "name, package",
    [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.tfrecord", "google_crc32c")],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(file_bytes(name, TEXTS))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'{package}: pip install "switch_jax\[data\]"'):
        read_file(tmp_path / name)


def test_bad_records_are_summarized_in_a_sentence():
    bad = BadRecords("skip")
    assert bad.summary() is None
    bad.add(EMPTY, "a.json, line 3")
    assert bad.summary() == "1 record was left out: 1 empty (first: a.json, line 3)."
    bad.add(EMPTY, "a.json, line 4")
    bad.merge({TOO_LONG: 4, EMPTY: 1}, {TOO_LONG: "b.json, line 1", EMPTY: "c.txt, line 1"})
    assert bad.summary() == (
        "7 records were left out: 4 too long (first: b.json, line 1),"
        " 3 empty (first: a.json, line 3)."
    )
    files = BadRecords("skip")
    files.merge({MISSING: 2}, {MISSING: "b-00001-of-00004.json"})
    assert files.summary() == "2 files are missing or unreadable (first: b-00001-of-00004.json)."


def test_bad_records_are_counted_across_threads():
    class Slow(dict):
        def get(self, *args):
            value = super().get(*args)
            time.sleep(1e-3)  # for others to read the same one
            return value

    bad = BadRecords("skip")
    bad.counts = Slow()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: bad.add(EMPTY, "a.json, line 1"), range(20)))
    assert bad.counts == {EMPTY: 20}
