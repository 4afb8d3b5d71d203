"""What is refused in a shard before it is read: members that are no files, lead elsewhere, or claim absurd sizes.

A shard is what a stranger wrote. Nothing in it is ever extracted; the limits keep what is held in memory small whatever
its headers say.
"""

import tarfile

from dalle_ds.data.skips import printable

MEBI = 2**20
MAX_MEMBER_BYTES = 256 * MEBI
# Extension -> most bytes, where they are fewer: a caption, and what came with it.
MAX_BYTES = {"txt": MEBI, "json": 4 * MEBI}
MAX_NAME = 80  # characters of a name in a reason
# Headers that go before a member and that tarfile reads whole: long names, and pax records.
MAX_HEADER_BYTES = MEBI
LONG_HEADERS = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)


def refusal(member: tarfile.TarInfo) -> str:
    """Why `member` is not to be read, or ""; for all but folders, which hold nothing."""
    name = printable(member.name[:MAX_NAME])
    if member.issym() or member.islnk():
        return f"{name} is a link"
    if not member.isreg():
        return f"{name} is no file (tar type {member.type!r})"
    if member.issparse():
        return f"{name} is a sparse file"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"{name} leads out of the shard"
    return too_large(member.name, member.size)


def too_large(name: str, n_bytes: int) -> str:
    """Why a file of this name and size is not to be read, or ""."""
    limit = MAX_BYTES.get(name.rpartition(".")[2].lower(), MAX_MEMBER_BYTES)
    return f"{printable(name[:MAX_NAME])} holds {n_bytes:,} bytes, more than {limit:,}" if n_bytes > limit else ""


def check_header(member: tarfile.TarInfo) -> None:
    """Raises tarfile.ReadError for a header of which tarfile would read more than 1 MiB, or a size below zero."""
    if member.size < 0 or (member.type in LONG_HEADERS and member.size > MAX_HEADER_BYTES):
        raise tarfile.ReadError(f"a header says {member.size:,} bytes")
