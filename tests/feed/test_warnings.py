"""What petastorm and torch warn of is ours to know: who feeds or takes windows sees none of it."""

import subprocess
import sys
from pathlib import Path

_FEEDS = """
import sys
from pathlib import Path
from jobs.training.feed import make_feed
from jobs.training.patches.window_feed import WindowFeed
from jobs.training.patches.windows import WindowFolder
from tests.feed.patch_slides import spec_of, write_slides
from tests.feed.tables import cohort, write
from tests.feed.test_patch_windows import plan_in, produce
root = Path(sys.argv[1])
feed = make_feed(str(write(root / "patients", cohort(6))), columns=("embeddings", "tile_index"))
spec, folder = spec_of(write_slides(root)), WindowFolder(root / "windows")
folder.root.mkdir()
plan_in(folder, spec)
produce(folder, spec, 0)
patches = sum(len(batch) for batch in WindowFeed(folder.root, 16, say=lambda _: None).epoch(0))
print(feed.backend, sum(len(bags.patient_id) for bags in feed.epoch(0)), patches)
"""


def test_nobody_is_shown_the_warnings_of_petastorm(tmp_path: Path) -> None:
    shown = [f"-Walways::{kind}" for kind in ("FutureWarning", "UserWarning")]
    command = [sys.executable, *shown, "-c", _FEEDS, str(tmp_path)]
    said = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == ("petastorm 6 100\n", "")
