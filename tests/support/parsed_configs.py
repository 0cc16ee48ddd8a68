"""Parses the configs of both stages on import, so that forks of the process have what jsonargparse keeps of classes.

Without it, a command takes half as long again to parse.
"""

import contextlib
import io

from cli import main

for _stage in ("vqvae", "transformer"):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(["fit", "--config", f"configs/{_stage}/shapes.yaml", "--print_config"])
