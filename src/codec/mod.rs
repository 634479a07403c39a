//! Opus, H.264, resampling, colour conversion, audio and video files, pictures.
