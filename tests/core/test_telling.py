"""What jobs tell in the same words."""

import re
from importlib.metadata import version

from udfs.wording import new_run_id, package_versions, some


def test_a_few_of_many_are_named_and_the_rest_counted() -> None:
    names = ["a", "b", "c"]
    assert [some(names, most) for most in (1, 2, 3, 9)] == ["a, and 2 more", "a, b, and 1 more", "a, b, c", "a, b, c"]
    assert some(["a: 1", "b: 2"], 1, "; ") == "a: 1; and 1 more"
    assert some([]) == ""


def test_run_ids_differ_and_packages_that_are_not_there_have_no_version() -> None:
    one, other = new_run_id(), new_run_id()
    assert one != other and re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", one)
    assert package_versions(["numpy", "no-such-package"]).items() >= {("numpy", version("numpy"))}
    assert set(package_versions(["numpy", "no-such-package"])) == {"python", "numpy"}
