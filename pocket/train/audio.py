"""Sound for the training data: files, rates, log-mels, and what rooms, whispering, music and small throats do to a voice."""
import wave

import numpy as np
import scipy.signal as sig

RATE = 16000


def mel_filters(window=512, bands=64, low=60., high=7600.):
    """[bands, window / 2 + 1] f32: triangles of equal area, even on the mel scale 2595 log10(1 + f / 700); librosa's with htk=True"""
    mel, hertz = lambda f: 2595 * np.log10(1 + f / 700), lambda m: 700 * (10 ** (m / 2595) - 1)
    edges = hertz(np.linspace(mel(low), mel(high), bands + 2))
    slopes = edges[:, None] - np.arange(window // 2 + 1) * RATE / window
    rising, falling = -slopes[:-2] / np.diff(edges)[:-1, None], slopes[2:] / np.diff(edges)[1:, None]
    return (np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


MEL_LEVELS = 255 / 11          # u8 code of a clamped log-mel value 0..11
MEL_FILTERS = mel_filters()
WINDOW = sig.get_window("hann", 512, fftbins=True).astype(np.float32)


def read_wave(path):
    """(samples in -1..1, rate) of a 16-bit mono file"""
    try:
        with wave.open(path) as w:
            return np.frombuffer(w.readframes(w.getnframes()), np.int16).astype(np.float32) / 32768, w.getframerate()
    except wave.Error as error:
        raise OSError(f"{path}: {error}") from error


def write_wave(path, x):
    with wave.open(path, "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(RATE)
        w.writeframes((np.clip(x, -1, 1) * 32767).astype(np.int16).tobytes())


def to_rate(audio, rate):
    g = np.gcd(int(rate), RATE)
    return sig.resample_poly(audio, RATE // g, int(rate) // g).astype(np.float32)


def log_mel(audio):
    """[n, 64], 50 Hz, frame i centred on sample 320 i + 160."""
    x = np.pad(audio, (256 - 160, 512))
    n = len(audio) // 320
    frames = np.lib.stride_tricks.sliding_window_view(x, 512)[::320][:n] * WINDOW
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    return np.clip(np.log10(power @ MEL_FILTERS.T + 1e-8) + 8, 0, 11).astype(np.float32)


def resized(x, segments, ratio):
    """Speed, pitch and formants together: below 1 shorter, higher, from a smaller throat."""
    n = int(len(x) * ratio)
    return np.interp(np.arange(n) / ratio, np.arange(len(x)), x).astype(np.float32), [(a * ratio, b * ratio, p) for a, b, p in segments]


def room(rng):
    n = int(rng.uniform(.08, .5) * RATE)
    h = rng.normal(size=n) * np.exp(-6.9 * np.arange(n) / n)
    h[:int(.002 * RATE)] = 0
    h *= rng.uniform(.1, .6) / np.sqrt((h ** 2).sum())
    h[0] = 1
    return h.astype(np.float32)


def whispered(x, rng):
    """The same mouth without a voice: the spectral envelope (30 cepstral coefficients) filled with noise."""
    _, _, z = sig.stft(x, RATE, nperseg=512, noverlap=384)
    cepstrum = np.fft.irfft(np.log(np.abs(z) + 1e-5), axis=0)
    cepstrum[30:-29] = 0
    envelope = np.exp(np.fft.rfft(cepstrum, axis=0).real)
    tilt = (1 - np.exp(-np.linspace(0, 8, len(envelope))))[:, None]           # no fundamental, less below 500 Hz
    noise = (rng.normal(size=z.shape) + 1j * rng.normal(size=z.shape)) / 2 ** .5
    _, y = sig.istft(envelope * tilt * noise, RATE, nperseg=512, noverlap=384)
    return np.pad(y, (0, max(0, len(x) - len(y))))[:len(x)].astype(np.float32)


def sung(x, segments, rng):
    """Vibrato: time itself sways 5 to 7 times a second, by less than a fiftieth of a second"""
    t = np.arange(len(x)) / RATE
    f, depth = rng.uniform(5, 7), rng.uniform(.01, .03)
    return np.interp(t + depth / (2 * np.pi * f) * np.sin(2 * np.pi * f * t), t, x).astype(np.float32), segments


def music(n, rng):
    """`n` samples of chords with overtones, a bass and a beat, of unit power"""
    t, out = np.arange(n) / RATE, np.zeros(n)
    beat = rng.uniform(.25, .7)
    root = rng.uniform(80, 220)
    steps = np.array([0, 3, 4, 5, 7, 8, 9, 12])
    for start in np.arange(0, n / RATE, beat):
        a, b = int(start * RATE), min(n, int((start + beat * rng.choice([.5, 1, 2])) * RATE))
        if b - a < 400:
            continue
        u = t[a:b] - start
        shape = np.minimum(u / rng.uniform(.005, .08), 1) * np.exp(-u * rng.uniform(.5, 6))
        for _ in range(rng.integers(1, 4)):
            f = root * 2 ** (rng.choice(steps) / 12 + rng.integers(-1, 3))
            out[a:b] += sum(np.sin(2 * np.pi * f * k * u + rng.uniform(0, 6)) * k ** -rng.uniform(.8, 2) for k in range(1, 9) if f * k < 7500) * shape
        if rng.random() < .5:                                                  # a drum
            out[a:b] += 3 * rng.normal(size=b - a) * np.exp(-u * rng.uniform(15, 60))
    return (out / (np.sqrt((out ** 2).mean()) + 1e-6)).astype(np.float32)
