//! Several processes as one service: who is there, who has room, and how requests reach the right one, over NATS.
//!
//! Every process is a [`Node`] with an id of its own, drawn at its start. Once a second it announces places and health
//! (a [`Beat`]); everybody keeps what it heard in a [`Table`]. A request for something new is asked of one of two
//! random nodes with room, the freer one, which alone admits; a session's id ends in its node's, so that whoever gets a
//! request for it knows whom to ask. Nothing is shared but messages: no disk, no leader, no database.
//!
//! Requests are asked and answered as HTTP-shaped [`Ask`]s and [`Reply`]s; what runs them is a [`Local`]. Media never
//! comes here.
//!
//! Whoever can publish on the bus is not believed for that: every message carries an HMAC of the cluster's secret
//! (`seal`), its time, and a number that is taken once.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | asks being answered | 256 | told "busy" (503) at once, counted |
//! | messages of the bus not yet read | 1024 for each subscription | dropped by the client, logged |
//! | numbers taken in the last 30 s | 65 536 | told "busy" (503) |
//! | nodes | 4096 | beats of more are dropped, logged |

mod beats;
mod config;
mod id;
mod node;
mod outage;
mod seal;
mod table;
mod wire;

pub use config::Config;
pub use id::NodeId;
pub use node::{Bus, ClusterError, Local, Node, Unanswered};
pub use table::{Place, Standing, Table};
pub use wire::{Ask, Beat, Facts, Reply, State};

use std::time::Duration;

/// How often a node says how it is.
pub const BEAT: Duration = Duration::from_secs(1);
/// A node that was not heard for so long is dead: three beats missed, and a little for the way.
pub const DEAD: Duration = Duration::from_millis(3500);
