//! How fast to send, what to send next, what not to send again. Pure: time is an argument, packets are opaque.
//!
//! | part | what it decides |
//! | --- | --- |
//! | [`history`] | which packet a transport-wide feedback entry speaks of |
//! | [`trend`] | whether queues on the path grow (one-way delay gradient) |
//! | [`estimator`] | the target bitrate: additive and multiplicative increase, decrease on delay and loss, probes, outages |
//! | [`pacer`] | when the next packet leaves; when a queue is too old to be worth sending |
//! | [`retransmit`] | which requests for old packets are answered |
//! | [`flow`] | the parts put together |
//!
//! Sources: the published description of Google Congestion Control (draft-ietf-rmcat-gcc-02; Carlucci et al., "Analysis
//! and Design of the Google Congestion Control for WebRTC", 2016) and of the trendline filter that replaced its Kalman
//! filter, draft-holmer-rmcat-transport-wide-cc-extensions-01, RFC 4585, RFC 4588.

mod estimator;
mod flow;
mod history;
mod pacer;
mod retransmit;
#[cfg(test)]
mod sim;
mod trend;

pub(in crate::net) use estimator::Limits;
pub(in crate::net) use flow::{Flow, Kind, Unit};
