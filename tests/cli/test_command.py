"""The command `gdn` as a user meets it: results, exit statuses, messages, interruptions.

Usage: test_command.py PATH_OF_GDN [unittest's arguments]
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

GDN = ""
FOLDER = Path()  # removed at the end
MODEL = Path()  # a tiny trained model
TEXT = Path()  # the files that it was trained on
TINY = ["--hidden-size=32", "--layers=1", "--heads=1", "--head-dim=16", "--threads=1"]
BATCHES = ["--batch-size=2", "--seq-len=64", "--warmup=2"]
SMALL_RUN = [*TINY, *BATCHES, "--steps=6", "--eval-every=0"]


def gdn(*arguments, **options):
    return subprocess.run([GDN, *map(str, arguments)], capture_output=True, timeout=120, **options)


def train(out, *more, **options):
    return gdn("train", "--data", TEXT, "--out", out, *SMALL_RUN, *more, **options)


def setUpModule():
    global FOLDER, MODEL, TEXT
    FOLDER = Path(tempfile.mkdtemp(prefix="gdn_test_"))
    TEXT, MODEL = FOLDER / "text", FOLDER / "model"
    TEXT.mkdir()
    words = random.Random(0)
    for number in range(20):
        line = " ".join(words.choice(["state", "gate", "delta", "rule"]) for _ in range(60))
        (TEXT / f"{number}.txt").write_text(line)
    result = train(MODEL)
    if result.returncode != 0:
        raise RuntimeError(result.stderr.decode())


def tearDownModule():
    shutil.rmtree(FOLDER)


class CommandTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(dir=FOLDER))

    def assert_fails(self, result, status, *named):
        """The status, and one line on standard error that names the command and the thing."""
        message = result.stderr.decode()
        self.assertEqual(result.returncode, status, message)
        self.assertEqual(message.count("\n"), 1, message)
        self.assertTrue(message.startswith("gdn"), message)
        for name in named:
            self.assertIn(str(name), message)

    def assert_succeeds(self, result):
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return result.stdout

    def copy_model(self):
        return Path(shutil.copytree(MODEL, self.folder / "model"))


class Usage(CommandTest):
    def test_help_everywhere(self):
        for command in ([], ["train"], ["generate"], ["eval"], ["convert"], ["info"]):
            text = self.assert_succeeds(gdn(*command, "--help")).decode()
            self.assertIn("Usage: gdn", text)
        self.assertIn("1000", self.assert_succeeds(gdn("train", "--help")).decode())

    def test_version(self):
        self.assertRegex(self.assert_succeeds(gdn("--version")).decode(), r"^\d+\.\d+\.\d+\n$")

    def test_wrong_usage(self):
        self.assert_fails(gdn(), 2)
        self.assert_fails(gdn("trian"), 2, "trian")
        for command in (
            ["train"],
            ["generate", "--model", MODEL],
            ["eval", "--model", MODEL, "--data", TEXT],
            ["convert", "--model", MODEL, "--out", self.folder / "run"],
            ["info"],
        ):
            self.assert_fails(gdn(*command, "--no-such"), 2, f"gdn {command[0]}", "--no-such")
        self.assert_fails(gdn("generate"), 2, "--model")
        self.assert_fails(gdn("eval", "--model", MODEL), 2, "--data")
        self.assert_fails(gdn("train", "--data", TEXT), 2, "out")
        self.assert_fails(gdn("train", "--out", self.folder / "run"), 2, "data")
        self.assert_fails(gdn("convert", "--model", MODEL), 2, "--out")
        self.assert_fails(train(self.folder / "run", "--lr", "fast"), 2, "--lr", "fast")
        self.assert_fails(train(self.folder / "run", "--preset", "huge"), 2, "huge")
        self.assert_fails(train(self.folder / "run", "--batch-size", "0"), 2, "batch")
        self.assert_fails(gdn("generate", "--model", MODEL, "--top-p", "2"), 2, "--top-p")
        for wrong in (
            ["--weight-dtype", "int4"],
            ["--weight-group", "64"],
            ["--weight-dtype", "int8", "--weight-group", "48"],
        ):
            self.assert_fails(gdn("generate", "--model", MODEL, *wrong), 2, wrong[-2])
        self.assertFalse((self.folder / "run").exists())


class OptionsFile(CommandTest):
    def write(self, content):
        file = self.folder / "options.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    def test_flags_win_and_the_run_records_all(self):
        run = self.folder / "run"
        file = self.write({"data": [str(TEXT)], "out": str(run), "lr": 0.5, "seq-len": 32})
        self.assert_succeeds(
            gdn("train", "--options", file, *TINY, "--steps=2", "--lr=0.25", "--batch-size=2")
        )
        record = json.loads((run / "train_options.json").read_text())
        self.assertEqual((record["lr"], record["seq_len"], record["beta1"]), (0.25, 32, 0.9))

    def test_a_record_is_an_options_file(self):
        again = self.folder / "again"
        record = MODEL / "train_options.json"
        self.assert_succeeds(gdn("train", "--options", record, "--out", again))
        self.assertEqual(
            (again / "model.safetensors").read_bytes(), (MODEL / "model.safetensors").read_bytes()
        )

    def test_bad_files(self):
        out = self.folder / "run"
        self.assert_fails(train(out, "--options", self.write({"leraning-rate": 1})), 2, "leraning")
        self.assert_fails(train(out, "--options", self.write({"lr": {"a": 1}})), 2, "lr")
        self.assert_fails(train(out, "--options", self.write({"beta1": "much"})), 2, "beta1")
        self.assert_fails(train(out, "--options", self.write("{")), 2, "JSON")
        self.assert_fails(train(out, "--options", self.folder / "none.json"), 2, "none.json")
        self.assertFalse(out.exists())


class TrainBadInput(CommandTest):
    def test_data(self):
        out = self.folder / "run"
        empty, secret = self.folder / "empty.txt", self.folder / "secret.txt"
        empty.touch()
        for data in (self.folder / "missing", empty):
            self.assert_fails(gdn("train", "--data", data, "--out", out, *SMALL_RUN), 1, data)
        secret.write_text("x" * 1000)
        secret.chmod(0)
        if not os.access(secret, os.R_OK):
            self.assert_fails(gdn("train", "--data", secret, "--out", out, *SMALL_RUN), 1, secret)
        short = self.folder / "short.txt"
        short.write_text("x" * 50)
        self.assert_fails(
            gdn("train", "--data", short, "--out", out, *TINY, "--seq-len=4096"), 2, "4096"
        )

    def test_config(self):
        config = self.folder / "config.json"
        config.write_text('{"hiden_size": 64}')
        self.assert_fails(
            gdn("train", "--data", TEXT, "--out", self.folder / "run", "--config", config),
            2,
            "hiden_size",
        )

    def test_a_run_is_not_overwritten(self):
        before = {file: file.read_bytes() for file in MODEL.rglob("*") if file.is_file()}
        self.assert_fails(train(MODEL), 1, MODEL)
        self.assertEqual(
            before, {file: file.read_bytes() for file in MODEL.rglob("*") if file.is_file()}
        )

    def test_nothing_to_resume(self):
        self.assert_fails(train(self.folder / "run", "--resume"), 1, self.folder / "run")

    def test_no_space(self):
        def limit_files():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

        run = self.folder / "run"
        result = train(run, preexec_fn=limit_files, restore_signals=False)
        self.assert_fails(result, 1, "File too large")
        self.assertFalse((run / "model.safetensors").exists())
        self.assertEqual(list(run.rglob("*.tmp*")), [])


class Resume(CommandTest):
    def setUp(self):
        super().setUp()
        every = ["--save-every=5", "--eval-every=10", "--log-every=1"]
        self.options = ["--data", TEXT, *TINY, *BATCHES, "--steps=40", *every]

    def start(self, run):
        return subprocess.Popen(
            [GDN, "train", "--out", run, *self.options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def interrupt(self, run, number):
        """Signals a run when it has a checkpoint and some steps more; returns its exit status."""
        process = self.start(run)
        deadline = time.monotonic() + 60
        target = random.randrange(6, 30)
        while time.monotonic() < deadline and process.poll() is None:
            metrics = run / "metrics.jsonl"
            if metrics.exists() and len(metrics.read_text().splitlines()) >= target:
                break
            time.sleep(0.002)
        process.send_signal(number)
        message = process.communicate()[1].decode()
        return process.returncode, message

    def assert_same_model(self, left, right):
        self.assertEqual(
            (left / "model.safetensors").read_bytes(), (right / "model.safetensors").read_bytes()
        )

    def test_interrupted_runs_end_like_an_uninterrupted_one(self):
        whole = self.folder / "whole"
        self.assert_succeeds(gdn("train", "--out", whole, *self.options))
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
            run = self.folder / f"run-{number.name}"
            status, message = self.interrupt(run, number)
            if number == signal.SIGKILL:
                self.assertEqual(status, -signal.SIGKILL)
            else:
                self.assertEqual(status, 1)
                self.assertIn("--resume", message)
            self.assertFalse((run / "model.safetensors").exists())
            self.assert_succeeds(gdn("train", "--out", run, "--resume"))
            self.assert_same_model(whole, run)


class Generate(CommandTest):
    def generate(self, *arguments, **options):
        return gdn("generate", "--model", MODEL, "--threads=1", *arguments, **options)

    def test_prompt_and_standard_input_agree(self):
        prompt = "state gate\nand more "
        for more in ([], ["--json"]):  # which also tells the prompt
            options = ["--max-new-tokens=20", "--seed=3", *more]
            by_flag = self.assert_succeeds(self.generate("--prompt", prompt, *options))
            by_input = self.assert_succeeds(self.generate(*options, input=prompt.encode()))
            self.assertEqual(by_flag, by_input)
            self.assertNotEqual(by_flag.strip(), b"")
            by_flag.decode()  # throws unless it is UTF-8

    def test_devices(self):
        arguments = ("generate", "--model", MODEL, "--prompt", "a", "--max-new-tokens", 3)
        on_cpu = self.assert_succeeds(gdn(*arguments, "--device", "cpu"))
        self.assertEqual(gdn(*arguments, "--device", "cpu", "--dtype", "fp32").stdout, on_cpu)
        self.assert_succeeds(gdn(*arguments, "--device", "auto", "--dtype", "fp16"))
        for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda:1000", ""):
            self.assert_fails(gdn(*arguments, "--device", name), 2, "device", f"'{name}'")
        # No machine has as many GPUs; the message depends on the build and on the machine.
        self.assert_fails(gdn(*arguments, "--device", "cuda:99"), 1, "device cuda:99")
        evaluated = gdn("eval", "--model", MODEL, "--data", TEXT, "--device", "cuda:99")
        self.assert_fails(evaluated, 1, "device cuda:99")

    def test_weights_in_int8(self):
        options = ["--prompt", "state gate", "--max-new-tokens=8", "--temperature=0"]
        for group in (0, 32):
            int8 = ["--weight-dtype=int8", f"--weight-group={group}"]
            self.assertNotEqual(self.assert_succeeds(self.generate(*options, *int8)), b"")
            losses = [
                json.loads(
                    self.assert_succeeds(
                        gdn("eval", "--model", MODEL, "--data", TEXT, "--json", *more)
                    )
                )["loss"]
                for more in ([], int8)
            ]
            self.assertNotEqual(*losses)
            self.assertAlmostEqual(*losses, delta=0.02)
        self.assert_fails(
            self.generate(*options, "--weight-dtype=int8", "--device=cuda"), 1, "cuda"
        )

    def test_several_prompts_do_not_change_each_other(self):
        options = ["--max-new-tokens=12", "--json", "--temperature=0"]
        prompts = ["delta", "state gate state", ""]
        together = self.assert_succeeds(self.generate("--prompt", *prompts, *options))
        lines = [json.loads(line) for line in together.decode().splitlines()]
        self.assertEqual([line["prompt"] for line in lines], prompts)
        for prompt, line in zip(prompts, lines):
            alone = self.assert_succeeds(self.generate("--prompt", prompt, *options))
            self.assertEqual(json.loads(alone)["text"], line["text"])
            self.assertLessEqual(line["tokens"], 12)

    def test_plain_output_of_several_prompts_is_in_order(self):
        out = self.assert_succeeds(self.generate("--prompt", "one", "two", "--max-new-tokens=4"))
        self.assertLess(out.index(b"--- one\n"), out.index(b"--- two\n"))

    def test_stop(self):
        options = ["--prompt", "rule", "--temperature=0", "--max-new-tokens=16", "--json"]
        text = json.loads(self.assert_succeeds(self.generate(*options)))["text"]
        stop = text[2:4]
        stopped = json.loads(self.assert_succeeds(self.generate(*options, "--stop", stop)))
        self.assertEqual(stopped["text"], text[: text.index(stop)])
        self.assertEqual(stopped["finish"], "stop")

    def test_closed_pipe_is_quiet(self):
        process = subprocess.Popen(
            [GDN, "generate", "--model", MODEL, "--prompt", "x", "--max-new-tokens=100000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process.stdout, process.stderr:
            process.stdout.read(1)
            process.stdout.close()
            self.assertEqual(process.stderr.read(), b"")
            self.assertIn(process.wait(timeout=60), (0, -signal.SIGPIPE))

    def test_full_disk(self):
        with open("/dev/full", "wb") as full:
            result = subprocess.run(
                [GDN, "generate", "--model", MODEL, "--prompt", "x", "--max-new-tokens=4"],
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=60,
            )
        self.assert_fails(result, 1, "standard output", "No space left")


class BadCheckpoints(CommandTest):
    def assert_does_not_load(self, model, *named):
        self.assert_fails(gdn("generate", "--model", model, "--prompt", "x"), 1, *named)

    def test_missing(self):
        self.assert_does_not_load(self.folder / "none", self.folder / "none")

    def test_shapes_that_do_not_fit(self):
        model = self.copy_model()
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
        self.assert_does_not_load(model, "model.safetensors", "32", "64")

    def test_unknown_configuration_key(self):
        model = self.copy_model()
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"hiden_size": 64}))
        self.assert_fails(gdn("generate", "--model", model, "--prompt", "x"), 2, "hiden_size")

    def test_broken_weights(self):
        model = self.copy_model()
        file = model / "model.safetensors"
        whole = file.read_bytes()
        header = struct.unpack("<Q", whole[:8])[0]
        for broken in (
            b"",
            whole[:5],
            whole[: header // 2],
            whole[:-1],
            whole + b"x",
            struct.pack("<Q", 2**63) + whole[8:],
            whole[:8] + b"x" * header + whole[8 + header :],
        ):
            file.write_bytes(broken)
            self.assert_does_not_load(model, file)


class Eval(CommandTest):
    def test_json_is_consistent(self):
        arguments = ["--model", MODEL, "--data", TEXT, "--threads=1", "--json"]
        result = json.loads(self.assert_succeeds(gdn("eval", *arguments)))
        self.assertEqual(result["documents"], 20)
        self.assertEqual(result["bytes"], sum(f.stat().st_size for f in TEXT.iterdir()))
        self.assertAlmostEqual(result["perplexity"], math.exp(result["loss"]), places=3)
        bits = result["loss"] * result["tokens"] / math.log(2) / result["bytes"]
        self.assertAlmostEqual(result["bits_per_byte"], bits, places=5)
        # The window only bounds the memory.
        narrow = json.loads(self.assert_succeeds(gdn("eval", *arguments, "--window=37")))
        self.assertAlmostEqual(result["loss"], narrow["loss"], places=4)

    def test_plain_text(self):
        out = self.assert_succeeds(gdn("eval", "--model", MODEL, "--data", TEXT)).decode()
        self.assertRegex(out, r"bits per byte +\d\.\d+")

    def test_missing_data(self):
        missing = self.folder / "missing"
        self.assert_fails(gdn("eval", "--model", MODEL, "--data", missing), 1, missing)


class Convert(CommandTest):
    """Conversions that succeed are in tests/models/test_convert.cpp and tests/compat."""

    def convert(self, model, *more):
        return gdn("convert", "--model", model, "--out", self.folder / "out", *more)

    def test_only_models_of_transformers(self):
        self.assert_fails(self.convert(MODEL), 1, "config.json", "model_type", "gated_deltanet")
        self.assert_fails(self.convert(self.folder / "none"), 1, self.folder / "none")
        self.assert_fails(self.convert(MODEL, "--base", MODEL), 2, "--base")
        layers = self.folder / "layers"
        layers.mkdir()
        (layers / "config.json").write_text('{"model_type": "gated_deltanet_layers"}')
        self.assert_fails(self.convert(layers), 2, "--base")
        self.assertFalse((self.folder / "out").exists())


class Info(CommandTest):
    def test_json(self):
        info = json.loads(self.assert_succeeds(gdn("info", "--json")))
        self.assertIn(info["kernels"]["chosen"], info["kernels"]["instruction_sets"])
        self.assertTrue(info["torch"].startswith("2.11"))
        self.assertIn("cpu", info["operators"]["gated_delta_rule_forward"])
        self.assertEqual(info["operators"]["chunk_gated_delta_rule"], ["composed"])
        dtypes = {"fp32", "bf16", "fp16"}  # as the options name them
        self.assertEqual(set(info["torch_kernels"]["matrix_products"]), dtypes)

    def test_text(self):
        text = self.assert_succeeds(gdn("info")).decode()
        for word in ("gdn ", "torch 2.11", "kernels", "gated_delta_rule_forward: cpu"):
            self.assertIn(word, text)


if __name__ == "__main__":
    GDN = sys.argv.pop(1)
    unittest.main(verbosity=2)
