"""Arrays that share their rows, in HDF5: written slice by slice, resumable, read as one.

A run directory holds one *segment* a slice of rows, `segments/<kind>-<start>-<stop>.h5`, and an *index*
`<kind>.h5` that joins them, by virtual datasets, or by a copy for the kinds that are mailed around. A file
appears under its name complete or not at all, and never changes afterwards, so a run that is killed loses the
segment in flight and nothing else. A store knows no model: what its rows depend on are plain JSON values.
"""

from gradfn.store.arrays import ArraySpec, Values, storable
from gradfn.store.compare import MISSING, differing, in_words
from gradfn.store.directory import index_path, remove_kind
from gradfn.store.file import Span, check_disk
from gradfn.store.reader import Store, open_part, open_store, request_beside, requests_of
from gradfn.store.writer import Overwrite, SettingsDiffer, Writer, open_writer

__all__ = [
    "MISSING",
    "ArraySpec",
    "Overwrite",
    "SettingsDiffer",
    "Span",
    "Store",
    "Values",
    "Writer",
    "check_disk",
    "differing",
    "in_words",
    "index_path",
    "open_part",
    "open_store",
    "open_writer",
    "remove_kind",
    "request_beside",
    "requests_of",
    "storable",
]
