"""The index of a shard: offset and size of each member of each sample, and the size and length of its clip.

- `store`: loads the index stored beside a shard, or makes and stores it.
- `tar`: scans the headers of a tar.
- `mp4`: reads the description of a video without its pictures.
- `compressed`: unpacks compressed tars.
- `remote`: reads bytes of local and remote files, with retries.
"""

from data.index.compressed import COMPRESSIONS, unpack
from data.index.remote import read_range, with_retries
from data.index.store import cache_folder, load_index, make_index
from data.index.tar import check_header

__all__ = [
    "COMPRESSIONS",
    "cache_folder",
    "check_header",
    "load_index",
    "make_index",
    "read_range",
    "unpack",
    "with_retries",
]
