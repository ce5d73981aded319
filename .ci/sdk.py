"""In an empty environment: the SDK works without the service, without torch, without what is optional."""

import re
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import headwater_client
from headwater_client import Client, errors

here = Path(headwater_client.__file__).parent
absent = ("app", "workers", "torch", "numpy", "pandas", "matplotlib", "transformers")
assert not [name for name in absent if find_spec(name)], "this environment is not empty"
assert (here / "py.typed").is_file()
brought = {re.split("[<>=; ]", one)[0] for one in requires("headwater-client") or () if "extra" not in one}
assert brought == {"httpx2", "pydantic"}, brought
try:
    Client("http://127.0.0.1:9", retries=0).is_alive()
except errors.ConnectionFailed as refused:
    print(refused)
try:
    headwater_client.to_pandas([])
except errors.PackageMissing as missing:
    print(missing)
print(f"headwater-client {headwater_client.__version__} works in an empty environment")
