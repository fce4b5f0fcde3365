"""Recognises files that are not token files, whatever their names, by their first bytes.

Any bytes may be tokens. So a pattern here fixes about 32 bits or more of a file's beginning, and text is recognised by
a complete block.
"""

import codecs
import re

HEAD_BYTES = 1 << 16
TEXT_BYTES = 8  # a shorter file is not recognised as text
# A pattern of the first bytes, what such a file is, and what to do.
KINDS = [
    (re.compile(pattern, re.DOTALL), f"{what}; {advice}")
    for pattern, what, advice in (
        (rb"version https://git-lfs|/annex/objects/", "a Git LFS or git-annex pointer", "fetch the file itself"),
        (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page", "the download was not the file itself: fetch it again"),
        (rb"LITPKDS", "lit-gpt's packed data", "write only its tokens, without the 24 bytes before them"),
        (rb"MMIDIDX\0", "the index of a Megatron file", "call it .idx and put the tokens beside it as .bin"),
        (rb'\{"format": "meshlm-packing"', "an index of launch.pack", "name the folder of its dataset"),
        (rb"TNTIDX\0", "an index of fairseq or of an old Megatron", "preprocess again"),
        (rb"\x1f\x8b\x08[\0-\x1f].{4}[\0\2\4][\0-\x0d\xff]", "compressed by gzip", "unpack it"),
        (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "compressed by zstd", "unpack it"),
        (rb"BZh[1-9](1AY&SY|\x17rE8P)", "compressed by bzip2", "unpack it"),
        (rb"\xfd7zXZ\0", "compressed by xz", "unpack it"),
        (rb"\x04\x22\x4d\x18|\xff\x06\0\0sNaPpY", "compressed by lz4 or snappy", "unpack it"),
        (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (.npz, .pt and .docx are, too)", "unpack it"),
        (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|!<arch>\n", "an archive", "unpack it"),
        (rb".{257}ustar", "a tar archive", "unpack it"),
        (rb"PAR1|ARROW1|\xff\xff\xff\xff.{3}\0\x10\0\0\0", "Parquet or Arrow", "write only its tokens"),
        (rb"\x89HDF\r\n\x1a\n", "HDF5", "write only its tokens"),
        (rb".{5}\0\0\0\{\"", "safetensors: a model's weights", "name others"),
        (rb"GGUF[\0-\x1f]", "a GGUF model", "name others"),
        (rb"\x80[\2-\5](\x8a\x0al\xfc\x9cF|\x95.{6}\0\0|[\}\]]q)", "a pickle, which is never opened", "name others"),
        (rb"\x89PNG\r\n|\xff\xd8\xff[\xe0-\xef]|GIF8[79]a", "an image", "name others"),
        (rb"SQLite format 3\0|%PDF-|\x7fELF", "a database, document or program", "name others"),
    )
]  # fmt: skip
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")


def describe(head: bytes) -> str:
    """What a file that begins with `head` (HEAD_BYTES, or all its bytes) is, and what to do; '' if it may be tokens."""
    for pattern, description in KINDS:
        if pattern.match(head):
            return description
    if _is_text(head):
        return "text; prepare it with python -m launch.prepare, or fetch the file again if a server answered with this"
    return ""


def _is_text(head: bytes) -> bool:
    """Whether all of `head` is printable UTF-8, or ASCII in UTF-16 after a byte order mark."""
    if len(head) < TEXT_BYTES:
        return False
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16-le" if head[0] == 0xFF else "utf-16-be"
        text = head[2:].decode(encoding, "replace")
        return text.isascii() and not CONTROL.search(text.encode())
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD_BYTES)
    except UnicodeDecodeError:
        return False
    return not CONTROL.search(head)
