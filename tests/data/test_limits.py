"""Data that would fill the memory, never end, or lead elsewhere: one bad image, or one line that names the file."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from image_folders import Formats, put, rows_of, skipped_of
from PIL import Image
from refused import refused

from ncsn.data.dataset import write_dataset
from ncsn.data.pixels import BadImageError, decode
from ncsn.data.sources import image_files, open_source, published_sets
from ncsn.data.sources.base import source_fingerprint

GOOD = {f"{number}.png": Formats.image(np.full((8, 8), number, np.uint8)) for number in range(4)}
ZEROS = bytes(1 << 20)
DEEP = b"[" * 200_000


def claimed(shape: object, kind: str = "|u1") -> bytes:
    """A `.npy` file of 100 bytes that claims to be of this shape and type."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)


def zipped(path: str, megabytes: int, *, claims: int | None = None, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of the good images and of a member of zeros, of which the directory claims another size."""
    buffer = io.BytesIO(Formats.zip(GOOD))
    with zipfile.ZipFile(buffer, "a", method) as archive, archive.open(path, "w") as member:
        for _ in range(megabytes):
            member.write(ZEROS)
    data = bytearray(buffer.getvalue())
    if claims is not None:
        struct.pack_into("<L", data, data.rindex(b"PK\x01\x02") + 24, claims)
    return bytes(data)


def tiff(channels: int = 5, compression: str = "zlib", **claims: int) -> bytes:
    """A TIFF file of 16x16 pixels that claims something else in these of its tags."""
    layout = {"photometric": "minisblack", "planarconfig": "contig"} if channels > 1 else {}
    values = np.zeros((16, 16, channels) if channels > 1 else (16, 16), np.uint16)
    tifffile.imwrite(buffer := io.BytesIO(), values, tile=(16, 16), compression=compression, **layout)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for name, value in claims.items():
            tag = file.pages.first.tags[name]
            struct.pack_into("<I" if tag.dtype == tifffile.DATATYPE.LONG else "<H", data, tag.valueoffset, value)
    return bytes(data)


ATTACKS = {
    "pixels.png": lambda: Formats.image(Image.new("1", (13_300, 13_300))),  # 177 megapixels
    "claim.npy": lambda: claimed((1 << 24, 1 << 24)),
    "deep.npy": lambda: claimed("-" * 8000 + "1"),
    "cut.npy": lambda: b"\x93NUMPY\x01\x00" + struct.pack("<H", 60) + b"{'descr': '|u1', 'shape': (8, 8".ljust(60),
    "tiles.tif": lambda: tiff(TileWidth=60_000, TileLength=60_000),
    "gray_tiles.tif": lambda: tiff(1, TileWidth=46_000, TileLength=46_000),
    "odd_bits.tif": lambda: tiff(BitsPerSample=8),  # of the first of the channels
    "packed.tif": lambda: tiff(3, "png"),  # which says itself how large it is
    "long.png": lambda: None,  # a terabyte, without taking any of the disk
    "declared.zip": lambda: zipped("x.png", 300),
    "lie.zip": lambda: zipped("x.png", 300, claims=1000),
    "bzip2.zip": lambda: zipped("x.png", 300, claims=1000, method=zipfile.ZIP_BZIP2),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_would_fill_the_memory_is_one_bad_image(tmp_path, data_config, name):
    path, content = tmp_path / "images" / name, ATTACKS[name]()
    put(tmp_path / "images", {} if name.endswith(".zip") else GOOD)
    path.parent.mkdir(exist_ok=True)
    if content is None:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(content)
    skip = data_config("image_folder", path.parent, on_bad_image="skip")
    tracemalloc.start()
    try:
        source = open_source(skip)
        bad, peak = skipped_of(source), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    key = f"{path}:x.png" if path.suffix == ".zip" else str(path)
    assert bad == [key] and peak < 64 << 20
    assert sum(map(len, rows_of(source).values())) == len(GOOD)
    fail = data_config("image_folder", path.parent)
    with refused(key):
        write_dataset(open_source(fail), str(tmp_path / "store"), name="x", data=fail)


def test_the_limit_is_compared_with_files_objects_cells_and_pixels_and_can_be_raised(
    tmp_path, s3_root, data_config, monkeypatch
):
    """Three bytes for each of its pixels."""
    few = Formats.image(Image.new("L", (1000, 1000)))
    many, padded = Formats.image(Image.new("L", (1000, 1001))), few + bytes(3_000_001 - len(few))
    files = {**GOOD, "few.png": few, "many.png": many, "padded.png": padded}
    cells = pa.table({"image": pa.array(files.values(), pa.binary()), "label": [0] * len(files)})
    pq.write_table(cells, rows := tmp_path / "x.parquet")
    for source, root in (
        ("image_folder", put(tmp_path / "folder", files)),
        ("image_folder", put(s3_root, files)),
        ("image_folder", put(tmp_path / "stored", {"x.tar": Formats.tar(files)})),
        ("parquet", str(rows)),
    ):
        bad = skipped_of(open_source(data_config(source, root, max_megapixels=1)))
        assert len(bad) == 2 and all(f"{name}.png" in str(bad) for name in ("many", "padded") if source != "parquet")
        assert skipped_of(open_source(data_config(source, root, max_megapixels=2))) == []
    for uri in (tmp_path / "folder", s3_root):
        put(uri, {"metadata.jsonl": bytes(3_000_001)})
        with refused(f"{uri}/metadata.jsonl"):
            open_source(data_config("image_folder", uri, max_megapixels=1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own, of the process
    with pytest.raises(BadImageError):
        decode(few)
    assert decode(few, largest=3_000_000).size == (1000, 1000)


def test_deep_nesting_and_the_shapes_of_strangers_are_told_by_the_file(tmp_path, data_config):
    for name in ("metadata.jsonl", "dataset.json"):
        root = put(tmp_path / name, {**GOOD, name: DEEP})
        with refused(f"{root}/{name}"):
            open_source(data_config("image_folder", root))
    root = put(tmp_path / "pair", {"x.zip": Formats.zip({**GOOD, "0.json": DEEP})})
    with refused(f"{root}/x.zip:0.json"):
        open_source(data_config("image_folder", root))
    images = pa.table({"image": pa.array(GOOD.values(), pa.binary())}).replace_schema_metadata({"huggingface": DEEP})
    pq.write_table(images, path := tmp_path / "hub.parquet")
    assert skipped_of(open_source(data_config("parquet", path))) == []
    for number, shape in enumerate((DEEP, b"[-8, -8, 1]", json.dumps([10**15, 10**15, 99]).encode())):
        facts = {"shape": shape, "dtype": "uint8", "limits": "[0, 255]"}
        columns = pa.schema([pa.field("image", pa.binary(64), metadata=facts)])
        pq.write_table(
            pa.table([pa.array([bytes(64)] * 4, pa.binary(64))], columns), path := tmp_path / f"{number}.parquet"
        )
        with refused(str(path)):
            open_source(data_config("parquet", path))


def test_labels_take_no_more_than_a_few_times_their_bytes(tmp_path, data_config):
    data, lines, long = {"max_megapixels": 15}, b"\n" * (1 << 20), b"\n" * (6 << 20)  # of 45 million bytes a fourth
    root = put(tmp_path / "lines", {"x.zip": Formats.zip({**GOOD, "metadata.jsonl": lines, "metadata.csv": lines})})
    tracemalloc.start()
    try:
        assert rows_of(open_source(data_config("image_folder", root, **data)))
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    tables = {f"{folder}/metadata.csv": long for folder in "ab"}
    root = put(tmp_path / "tables", {"x.zip": Formats.zip({**GOOD, **tables})})
    with refused(f"{root}/x.zip:b/metadata.csv"):
        open_source(data_config("image_folder", root, **data))
    for name, word in (("0.cls", b"a" * 256), ("0.json", json.dumps({"label": [0] * 256}).encode())):
        root = put(tmp_path / name, {"x.zip": Formats.zip({**GOOD, name: word})})
        with refused(f"{root}/x.zip:{name}"):
            open_source(data_config("image_folder", root))


def test_a_few_bytes_of_a_parquet_file_are_not_repeated_for_each_row(tmp_path, data_config):
    images = pa.array([GOOD["0.png"]] * 500, pa.binary())
    words = pa.DictionaryArray.from_arrays([0] * 500, ["a" * (4 << 20)])
    pq.write_table(pa.table({"image": images, "label": words}), path := tmp_path / "words.parquet", store_schema=False)
    before = pa.default_memory_pool().max_memory()
    with refused("data.root"):
        open_source(data_config("parquet", path))
    assert pa.default_memory_pool().max_memory() <= max(before, 256 << 20)
    pq.write_table(pa.table({"image": pa.nulls(20_000_000, pa.binary())}), path := tmp_path / "nulls.parquet")
    with refused(str(path)):
        open_source(data_config("parquet", path))
    facts = {"shape": b"[1000, 1001, 1]", "dtype": "uint8", "limits": "[0, 255]"}
    kind = pa.binary(1000 * 1001)
    large = pa.table([pa.array([bytes(1000 * 1001)] * 4, kind)], pa.schema([pa.field("image", kind, metadata=facts)]))
    pq.write_table(large, path := tmp_path / "pixels.parquet")
    data = data_config("parquet", path, on_bad_image="skip")
    assert skipped_of(open_source(data)) == []
    assert len(skipped_of(open_source(data.model_copy(update={"max_megapixels": 0.3})))) == 4


def test_a_progressive_jpeg_counts_as_all_that_is_kept_of_it():
    for progressive, passes in ((False, True), (True, False)):
        Image.new("CMYK", (2000, 1000)).save(file := io.BytesIO(), "JPEG", progressive=progressive)
        if passes:
            assert decode(file.getvalue(), least_side=8, largest=3_000_000).size == (2000, 1000)
        else:
            with pytest.raises(BadImageError):
                decode(file.getvalue(), least_side=8, largest=3_000_000)


def test_only_two_large_images_are_decoded_at_a_time(tmp_path, data_config, monkeypatch):
    monkeypatch.setattr(image_files, "_LARGE", 1000)
    files = {f"{number}.png": Formats.image(np.full((40, 40), number, np.uint8)) for number in range(48)}
    split = open_source(data_config("image_folder", put(tmp_path, files))).splits["train"]
    inside, most, lock = 0, 0, Lock()

    def watched(image: image_files.Encoded, picture: object) -> str:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1
        return image.name

    assert isinstance(split, image_files.DecodedSplit)
    assert len(set(split.each(watched, least_side=None, cores=8))) == len(split)
    assert most == 2


def tar_header(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims a size."""
    info = tarfile.TarInfo("x.png")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(header)[0]
    return bytes(header)


@pytest.mark.parametrize(
    "member",
    [
        tar_header(-512),  # which a loop over the members finds for ever
        tar_header(1 << 60, tarfile.XHDTYPE),
        tar_header(1 << 70, tarfile.XHDTYPE),
        tar_header(-512, tarfile.XHDTYPE),
        (tar_header(12, tarfile.XHDTYPE) + b"12 a=bcdefg\n".ljust(512, b"\0")) * 2000,
    ],
    ids=["goes back", "long name", "longer name", "negative name", "names of names"],
)
def test_a_tar_whose_headers_lie_is_refused(tmp_path, data_config, member):
    whole = Formats.tar(GOOD).rstrip(b"\0")
    whole = whole.ljust(-(-len(whole) // 512) * 512, b"\0")
    root = put(tmp_path, {"x.tar": whole + member + bytes(1024)})
    with refused(f"{root}/x.tar"):
        open_source(data_config("image_folder", root))


@pytest.mark.parametrize("compress", [False, True])
def test_an_idx_file_is_unpacked_no_further_than_it_may_be_long(idx_folder, data_config, monkeypatch, compress):
    folder, _ = idx_folder(compress=compress)
    assert len(open_source(data_config("mnist", folder)).splits["train"]) == 12
    monkeypatch.setattr(published_sets, "_MOST_IDX_BYTES", 500)
    with refused(f"{folder}/train-images-idx3-ubyte{'.gz' * compress}"):
        open_source(data_config("mnist", folder))


@pytest.mark.parametrize("inside", ["far.png", "folder"])
def test_a_link_out_of_the_root_is_followed_only_where_the_config_says_so(tmp_path, data_config, inside):
    elsewhere = Path(put(tmp_path / "elsewhere", {"far.png": GOOD["0.png"], "folder/far.png": GOOD["0.png"]}))
    root = Path(put(tmp_path / "images", {f"a/{name}": content for name, content in GOOD.items()}))
    (root / "near.png").symlink_to(root / "a" / "0.png")
    (tmp_path / "link").symlink_to(root)
    data = data_config("image_folder", tmp_path / "link")  # the root itself may be one
    fingerprint = source_fingerprint(data)
    assert sum(map(len, rows_of(open_source(data)).values())) == 5
    (root / inside).symlink_to(elsewhere / inside)
    for read in (open_source, source_fingerprint):
        with refused(f"{tmp_path}/link/{inside}"):
            read(data)
    told = data.model_copy(update={"follow_links": True})
    assert source_fingerprint(told) != fingerprint and sum(map(len, rows_of(open_source(told)).values())) == 6
