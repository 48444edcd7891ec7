"""What pytest leaves alone when it looks for doctests."""

import os

# These register a device with PyTorch, for the whole process: test_device.py runs them in one of their own.
collect_ignore = [] if os.environ.get("GRADFN_ON_DEVICE") else ["elsewhere.py", "on_device.py"]
