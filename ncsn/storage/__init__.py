"""The store: one way to name, read and publish bytes on a local disk or in S3."""

from ncsn.storage.files import (
    S3_SCHEME as S3_SCHEME,
)
from ncsn.storage.files import (
    UnreadableError as UnreadableError,
)
from ncsn.storage.files import (
    absolute as absolute,
)
from ncsn.storage.files import (
    delete_file as delete_file,
)
from ncsn.storage.files import (
    delete_folder as delete_folder,
)
from ncsn.storage.files import (
    digest as digest,
)
from ncsn.storage.files import (
    exists as exists,
)
from ncsn.storage.files import (
    filesystem as filesystem,
)
from ncsn.storage.files import (
    find_json as find_json,
)
from ncsn.storage.files import (
    is_file as is_file,
)
from ncsn.storage.files import (
    is_local as is_local,
)
from ncsn.storage.files import (
    join as join,
)
from ncsn.storage.files import (
    list_names as list_names,
)
from ncsn.storage.files import (
    local_copy as local_copy,
)
from ncsn.storage.files import (
    local_file as local_file,
)
from ncsn.storage.files import (
    new_scratch as new_scratch,
)
from ncsn.storage.files import (
    publish_file as publish_file,
)
from ncsn.storage.files import (
    publish_folder as publish_folder,
)
from ncsn.storage.files import (
    publish_once as publish_once,
)
from ncsn.storage.files import (
    read_array as read_array,
)
from ncsn.storage.files import (
    read_bytes as read_bytes,
)
from ncsn.storage.files import (
    read_json as read_json,
)
from ncsn.storage.files import (
    read_text as read_text,
)
from ncsn.storage.files import (
    remove_scratch as remove_scratch,
)
from ncsn.storage.files import (
    scratch_folder as scratch_folder,
)
from ncsn.storage.files import (
    staged_folder as staged_folder,
)
from ncsn.storage.files import (
    write_array as write_array,
)
from ncsn.storage.files import (
    write_bytes as write_bytes,
)
from ncsn.storage.files import (
    write_json as write_json,
)
from ncsn.storage.files import (
    write_text as write_text,
)
