"""What the README says exists: paths, make targets, the command's options. Its C++ quick start is
built and run by install.cmake.

Usage: test_readme.py PATH_OF_GDN
"""

import re
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
GDN = ""


class Readme(unittest.TestCase):
    def test_paths_exist(self):
        paths = re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?|\w+/|\w+\.(?:md|txt))`", README)
        paths += re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
        self.assertGreater(len(paths), 10)
        made_by_running = ("build/", "demo/", "runs/", "gdn/")
        for path in paths:
            if not path.startswith(made_by_running):
                self.assertTrue((ROOT / path).exists(), path)

    def test_make_targets_exist(self):
        makefile = (ROOT / "Makefile").read_text()
        targets = set(re.findall(r"(?m)(?:`|^)make ([a-z]+)", README))
        self.assertLessEqual({"demo", "test"}, targets)
        for target in targets:
            self.assertRegex(makefile, rf"(?m)^{target}:", target)

    def test_options_exist(self):
        commands = re.findall(
            r"(?m)^(?:\S+/)?gdn (train|generate|eval|convert|info)((?:.*\\\n)*.*)", README
        )
        self.assertGreater(len(commands), 2)
        for command, rest in commands:
            known = subprocess.run([GDN, command, "--help"], capture_output=True, text=True).stdout
            for option in re.findall(r"--[\w-]+", rest):
                self.assertRegex(known, rf"{option}\b", f"gdn {command}")

    def test_packages_are_those_that_setup_installs(self):
        setup = (ROOT / "scripts/setup.sh").read_text()
        installed = set()
        for group in re.findall(r"(?:system|python)=\(([^)]*)\)", setup):
            installed |= {re.split("[=>]", name)[0] for name in group.split()}
        table = README.split("## Packages")[1].split("\n## ")[0]
        explained = set(re.findall(r"(?m)^\| `([\w+-]+)`", table))
        self.assertEqual(installed, explained - {"cmake", "ninja"})


if __name__ == "__main__":
    GDN = sys.argv.pop(1)
    unittest.main()
