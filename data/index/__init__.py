"""The index of a shard: offset and size of each member of each sample, and the size and length of its clip.

- `store`: loads the index stored beside a shard, or makes and stores it.
- `tar`: scans a tar for samples.
- `headers`: reads the headers of a tar.
- `mp4`: reads the description of a video without its pictures.
- `compressed`: unpacks compressed tars.
- `remote`: reads bytes of local and remote files, with retries.
"""

from data.index.compressed import COMPRESSIONS, is_unpacked, unpack
from data.index.headers import check_header
from data.index.remote import read_range, with_retries
from data.index.store import cache_folder, load_index, make_index

__all__ = [
    "COMPRESSIONS",
    "cache_folder",
    "check_header",
    "is_unpacked",
    "load_index",
    "make_index",
    "read_range",
    "unpack",
    "with_retries",
]
