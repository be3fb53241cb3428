"""Reading audio: formats, rates, channels, and everything that can be wrong with a file."""

from __future__ import annotations

import io
import os
import pickle
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch

from tests.helpers.signals import SECONDS, speech_like, stereo, write_container
from w2vbert_fast.inference import Audio, AudioError, load_audio, to_mono_16khz

EXPECTED = speech_like(SECONDS, 16_000)
# Samples next to the ends: a resampler sees the signal start from nothing there.
EDGE = 400


def reason_of(path: Path) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(path)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


def relative_error(audio: Audio | torch.Tensor, delay: int = 0) -> float:
    samples = audio.samples if isinstance(audio, Audio) else audio
    got = samples.numpy()[delay:][: EXPECTED.size][EDGE:-EDGE]
    wanted = EXPECTED[EDGE:-EDGE][: got.size]
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("container", "subtype", "rate", "tolerance"),
    [
        ("WAV", "PCM_16", 16_000, 1e-3),
        ("WAV", "PCM_24", 16_000, 1e-5),
        ("WAV", "FLOAT", 16_000, 1e-6),
        ("WAV", "DOUBLE", 44_100, 2e-3),
        ("WAV", "PCM_U8", 16_000, 0.1),
        ("WAV", "ULAW", 8_000, 0.05),
        ("FLAC", "PCM_16", 8_000, 2e-3),
        ("FLAC", "PCM_24", 48_000, 2e-3),
        ("AIFF", "PCM_16", 22_050, 2e-3),
        ("W64", "PCM_16", 96_000, 2e-3),
        ("OGG", "VORBIS", 16_000, 0.2),
        ("OGG", "OPUS", 48_000, 0.2),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_becomes_the_same_16_khz_signal(
    tmp_path: Path, container: str, subtype: str, rate: int, tolerance: float, channels: int
) -> None:
    path = tmp_path / "clip"
    signal = speech_like(SECONDS, rate) if channels == 1 else stereo(rate)
    soundfile.write(path, signal, rate, format=container, subtype=subtype)
    audio = load_audio(path)
    assert audio.samples.dtype == torch.float32
    assert audio.samples.shape == (EXPECTED.size,)
    assert audio.seconds == pytest.approx(SECONDS, abs=1e-9)
    assert relative_error(audio) < tolerance


@pytest.mark.parametrize(
    ("name", "codec", "rate", "container_format", "delay"),
    [
        ("clip.m4a", "aac", 44_100, None, 0),
        ("clip.mp4", "aac", 16_000, None, 0),
        ("clip.webm", "libopus", 48_000, None, 0),
        ("clip.mkv", "flac", 44_100, None, 0),
        ("clip.ts", "aac", 48_000, "mpegts", 1024 // 3),
        ("clip.aac", "aac", 16_000, "adts", 1024),
    ],
)
def test_containers_that_libsndfile_cannot_read(
    tmp_path: Path,
    name: str,
    codec: str,
    rate: int,
    container_format: str | None,
    delay: int,
) -> None:
    path = tmp_path / name
    write_container(path, codec, rate, container_format=container_format)
    audio = load_audio(path)
    assert audio.seconds == pytest.approx(SECONDS, abs=0.15)
    # A file of bare AAC frames cannot say that its first samples are the encoder's delay.
    assert relative_error(audio, delay) < 0.1


@pytest.mark.parametrize("layout", ["5.1", "7.1", "hexadecagonal"])
def test_many_channels(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "clip.mov"
    write_container(path, "pcm_s24le", 48_000, layout=layout)
    assert relative_error(load_audio(path)) < 2e-3


def vbr_mp3(with_length: bool) -> bytes:
    """Quiet, then loud: a bit rate guessed from the start is far off."""
    loud = np.random.default_rng(0).standard_normal(16_000 * 2) * 0.3
    signal = np.concatenate([loud, np.zeros(16_000 * 6)])
    file = io.BytesIO()
    soundfile.write(
        file,
        signal,
        16_000,
        format="MP3",
        subtype="MPEG_LAYER_III",
        bitrate_mode="VARIABLE",
        compression_level=0.3,
    )
    data = file.getvalue()
    if with_length:
        return data
    first_frame = data.index(b"Xing")
    return data[data.index(data[:2], first_frame) :]


@pytest.mark.parametrize("with_length", [True, False])
def test_an_mp3_of_variable_bit_rate_is_read_to_its_end(tmp_path: Path, with_length: bool) -> None:
    path = tmp_path / "clip.mp3"
    path.write_bytes(vbr_mp3(with_length))
    assert load_audio(path).seconds == pytest.approx(8, abs=0.2)


def test_tags_after_the_end_of_an_mp3_do_no_harm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.mp3"
    path.write_bytes(vbr_mp3(with_length=True) + b"\0" * 5000 + bytes(range(256)) * 10)
    assert load_audio(path).seconds == pytest.approx(8, abs=0.2)
    assert capfd.readouterr() == ("", "")


def test_a_stream_that_ends_within_a_packet_loses_only_that_packet(tmp_path: Path) -> None:
    path = tmp_path / "clip.aac"
    write_container(path, "aac", 16_000, container_format="adts")
    whole = load_audio(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert load_audio(path).seconds == pytest.approx(whole.seconds - 1024 / 16_000, abs=1e-6)


def test_a_flac_stream_that_states_no_length(tmp_path: Path) -> None:
    path = tmp_path / "clip.flac"
    soundfile.write(path, EXPECTED, 16_000)
    data = bytearray(path.read_bytes())
    # STREAMINFO ends its 36-bit number of samples 18 bytes in; it starts at byte 8.
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    audio = load_audio(path)
    assert audio.samples.shape == (EXPECTED.size,)
    assert relative_error(audio) < 1e-3


@pytest.mark.parametrize(
    "size", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000, 2 * EXPECTED.size + 44, 2 * EXPECTED.size + 36]
)
def test_a_wav_file_of_unknown_or_sloppily_counted_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, EXPECTED, 16_000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    data[4:8] = struct.pack("<I", size)
    path.write_bytes(data)
    assert load_audio(path).samples.shape == (EXPECTED.size,)


def test_a_file_longer_than_one_block(tmp_path: Path) -> None:
    """The blocks of a long file join without a seam: as if it had been converted at once."""
    signal = speech_like(60, 44_100)
    path = tmp_path / "long.wav"
    soundfile.write(path, signal, 44_100, subtype="FLOAT")
    audio = load_audio(path)
    assert torch.equal(audio.samples, torch.from_numpy(soxr.resample(signal, 44_100, 16_000)))
    assert audio.seconds == pytest.approx(60)


def test_another_target_rate(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, EXPECTED, 16_000, subtype="FLOAT")
    got = load_audio(path, sampling_rate=8_000).samples.numpy()
    wanted = speech_like(SECONDS, 8_000)
    assert np.linalg.norm((got - wanted)[EDGE:-EDGE]) < 2e-3 * np.linalg.norm(wanted)


def test_a_named_pipe(tmp_path: Path) -> None:
    file = io.BytesIO()
    soundfile.write(file, EXPECTED, 16_000, format="WAV")
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(file.getvalue(),))
    writer.start()
    audio = load_audio(path)
    writer.join()
    assert relative_error(audio) < 1e-3


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/a \xff\nb.wav")
    soundfile.write(os.fsencode(name), EXPECTED, 16_000, format="WAV")
    assert relative_error(load_audio(name)) < 1e-3
    video = os.fsdecode(os.fsencode(tmp_path) + b"/a \xff\nb.m4a")
    file = io.BytesIO()
    write_container(file, "aac", 16_000, container_format="mp4")
    Path(video).write_bytes(file.getvalue())
    assert relative_error(load_audio(video)) < 0.1


def no_such_file(path: Path) -> None:
    assert not path.exists()


def a_folder(path: Path) -> None:
    path.mkdir()


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("not a folder")


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("This is not audio, whatever it is called.\n" * 40)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(50_000))


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(3).bytes(50_000))


def picture(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def written(**options: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        soundfile.write(path, **{"data": EXPECTED, "samplerate": 16_000} | options)

    return write


def cut(write: Callable[[Path], None], share: float = 0.5) -> Callable[[Path], None]:
    def write_a_part(path: Path) -> None:
        write(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return write_a_part


def contained(codec: str, container: str, **options: str) -> Callable[[Path], None]:
    return lambda path: write_container(
        path, codec, 48_000, seconds=6, container_format=container, options=options
    )


def damaged_in_the_middle(path: Path) -> None:
    file = io.BytesIO()
    write_container(file, "aac", 48_000, seconds=6, container_format="adts")
    data = bytearray(file.getvalue())
    middle = slice(len(data) // 3, len(data) // 2)
    data[middle] = bytes(byte ^ 0x5A for byte in data[middle])
    path.write_bytes(data)


def of_unknown_coding(path: Path) -> None:
    soundfile.write(path, EXPECTED, 16_000, format="WAV")
    data = bytearray(path.read_bytes())
    data[20:22] = b"\x99\x99"
    path.write_bytes(data)


def with_a_size_outside_the_file(path: Path) -> None:
    soundfile.write(path, EXPECTED, 16_000, format="W64", subtype="PCM_16")
    data = bytearray(path.read_bytes())
    data[64:66] = b"\x99\x99"
    data[102] = 0xEF
    path.write_bytes(data)


LONG = speech_like(6, 16_000)
BAD_VALUES = EXPECTED.copy()
BAD_VALUES[1000] = np.nan
INFINITE = EXPECTED.copy()
INFINITE[-1] = np.inf


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (no_such_file, "No such file or directory"),
        (a_folder, "Is a directory"),
        (below_a_file, "Not a directory"),
        (empty, "the file is empty"),
        (text, "cannot be read as audio: it is text; names of manifests end with .jsonl"),
        (zeros, "cannot be read as audio"),
        (noise, "cannot be read as audio: unknown format, or damaged"),
        (picture, "has no audio stream"),
        (written(format="WAV", data=EXPECTED[:0]), "holds no samples"),
        (written(format="FLAC", data=EXPECTED[:559]), "too short: 34.9 ms"),
        (written(format="WAV", data=EXPECTED[:1], samplerate=96_000), "too short: 0.0 ms"),
        (written(format="WAV", samplerate=100), "sampling rate of 100 Hz"),
        (written(format="WAV", subtype="FLOAT", data=BAD_VALUES), "NaN or infinite"),
        (written(format="WAV", subtype="FLOAT", data=INFINITE), "NaN or infinite"),
        (cut(written(format="WAV")), "truncated: "),
        (cut(written(format="WAV"), share=44 / (44 + 2 * EXPECTED.size)), "truncated: 0 of"),
        (cut(written(format="AIFF")), "truncated"),
        (cut(written(format="FLAC")), "truncated"),
        (cut(written(format="CAF")), "truncated"),
        (
            cut(written(format="OGG", subtype="VORBIS", data=LONG)),
            "has no last page",
        ),
        (cut(written(format="OGG", subtype="OPUS", data=LONG)), "has no last page"),
        (of_unknown_coding, "has audio of a coding that neither"),
        (with_a_size_outside_the_file, "truncated"),
        (cut(contained("aac", "mp4")), "cannot be read as audio"),
        (cut(contained("aac", "mp4", movflags="faststart")), "it ends after"),
        (cut(contained("libopus", "webm")), "it ends after"),
        (cut(contained("flac", "matroska")), "it ends after"),
        (damaged_in_the_middle, "damaged"),
    ],
)
def test_what_cannot_be_read_says_why(
    tmp_path: Path,
    make: Callable[[Path], None],
    expected: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "folder" / "clip.wav"
    path.parent.mkdir()
    make(path)
    capfd.readouterr()
    assert expected in reason_of(path)
    # The libraries underneath stay silent too.
    assert capfd.readouterr() == ("", "")


def test_35_ms_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, EXPECTED[:560], 16_000)
    assert load_audio(path).samples.shape == (560,)


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, EXPECTED, 16_000)
    path.chmod(0)
    tmp_path.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        # Root may read everything.
        os.seteuid(65534)
    try:
        assert reason_of(path) == "Permission denied"
    finally:
        os.seteuid(user)


def test_devices_and_null_characters() -> None:
    assert reason_of(Path("/dev/null")) == "not a regular file"
    assert "null character" in reason_of(Path("a\0b"))


def test_the_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "is bad")))
    assert (error.path, error.reason, str(error)) == ("a.wav", "is bad", "a.wav: is bad")


def test_no_file_stays_open(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    soundfile.write(good, EXPECTED, 16_000)
    soundfile.write(bad, BAD_VALUES, 16_000, subtype="FLOAT")
    movie = tmp_path / "movie.m4a"
    write_container(movie, "aac", 16_000)
    before = len(os.listdir("/dev/fd"))
    errors = []
    for _ in range(3):
        load_audio(good)
        load_audio(movie)
        with pytest.raises(AudioError) as caught:
            load_audio(bad)
        errors.append(caught.value)
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [
        (np.int16, 2**15, 0),
        (np.int32, 2**31, 0),
        (np.uint8, 2**7, 128),
        (np.float64, 1, 0),
        (np.float32, 1, 0),
    ],
)
def test_arrays_of_every_type(dtype: type, scale: int, offset: int) -> None:
    values = (EXPECTED.astype(np.float64) * scale + offset).astype(dtype)
    for array in (values, torch.from_numpy(values), values.tolist()):
        if isinstance(array, list) and dtype not in (np.float64, np.float32):
            continue
        got = to_mono_16khz(array, 16_000)
        assert got.dtype == torch.float32
        assert np.abs(got.numpy() - EXPECTED).max() <= 1.01 / scale if scale > 1 else 1e-7


def test_arrays_in_half_precision_and_with_gradients() -> None:
    half = torch.from_numpy(EXPECTED).bfloat16().requires_grad_()
    assert torch.equal(to_mono_16khz(half, 16_000), half.detach().float())


def test_channels_and_rate_of_an_array() -> None:
    got = to_mono_16khz(stereo(44_100).T, 44_100)
    assert got.shape == EXPECTED.shape
    assert relative_error(got) < 2e-3


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 4)), "got sizes \\[2, 3, 4\\]"),
        (np.float32(3), "got sizes \\[\\]"),
        (np.zeros(0), "holds no samples"),
        (np.zeros((2, 0)), "holds no samples"),
        (np.zeros((1000, 2)), "more channels than samples"),
        (np.full(1000, 12345), "int64, which has no full scale"),
        (BAD_VALUES, "NaN or infinite"),
    ],
)
def test_arrays_that_are_not_audio(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_mono_16khz(array, 16_000)


def test_wrong_types_and_rates(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="complex128"):
        to_mono_16khz(np.zeros(1000, complex), 16_000)
    for rate in (0, -16_000):
        with pytest.raises(ValueError, match=f"sampling_rate must be positive, got {rate}"):
            to_mono_16khz(EXPECTED, rate)
        with pytest.raises(ValueError, match=f"sampling_rate must be positive, got {rate}"):
            load_audio(tmp_path / "x.wav", sampling_rate=rate)
