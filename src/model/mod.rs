//! The networks as maths; candle lives here. No tokio, no clock, no sockets.
