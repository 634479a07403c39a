//! Several devices, one stream of video: who computes what, and how parts travel.
//!
//! A *rank* is a thread with a device of its own. A block of latent frames goes from stage to stage of a [`Layout`], each
//! stage with its own steps' rings (step pipelining, MODEL.md §9.4 of the specification); the ranks of one stage share
//! each of its steps by tokens and heads ([`Share`]: Ulysses, §6.9). The networks are the same as on one device: a stage
//! is a stretch of [`crate::model::dit::Dit::travel`].
//!
//! | file | what it is |
//! | --- | --- |
//! | [`layout`] | which rank does what, from stage times: a pure function |
//! | [`link`] | what ranks send each other with: channels in this process, or NCCL between NVIDIA cards |
//! | [`share`] | one rank's part of a sequence of tokens and of the heads |

mod layout;
mod link;
mod share;

pub use layout::{Costs, Layout, Split, Stage};
pub use link::{Breaker, Link, connect, in_process};
#[cfg(feature = "cuda")]
pub(crate) use link::{Ends, mesh};
pub use share::Share;

/// The part of `total` things that member `i` of `of` has: all parts are as large as each other, or one larger.
pub fn part(total: usize, of: usize, i: usize) -> std::ops::Range<usize> {
    let of = of.max(1);
    total * i / of..total * (i + 1) / of
}
