//! The SPI over a unix socket: a host's providers stand in one process and are called from another.
//!
//! ```text
//! control: RemotePart (every trait) ── Remote ──socket── Server ── Served (the real providers)
//! ```
//! [`Remote`] gives objects that implement the traits of [`spi`](crate::spi); [`Server`] answers them with the providers in
//! [`Served`]. One blanket implementation carries the four verbs of every kind.
//!
//! # The wire
//! * A frame is a length (big-endian `u32`, at most [`FRAME_MAX`]) and a CBOR map with field names. Arguments and answers are
//!   CBOR byte strings inside it, so that one that cannot be read harms only its own call; pages are decoded item by item.
//! * The first frame of each side names the protocols it speaks, oldest and newest; the newest common one is used. Unknown
//!   fields are ignored in observations; a spec that is not understood as a whole fails with `Unsupported` and no effect.
//! * A call carries its remaining time. Giving up is a frame of its own. Dropping the future of a call loses only the answer.
//! * Streams are pulled: each read gives the other side credit for one item.
//!
//! # What an error means
//! | what happened | kind | outcome |
//! |---|---|---|
//! | nobody listens, or the greeting failed | `Unavailable` | `NotDone` |
//! | the send queue is full, or too many calls are in flight | `RateLimited` | `NotDone` |
//! | the connection was lost with the call on its way | `Unavailable` | `Unknown` |
//! | the time ran out | `Timeout` | `Unknown` |
//! | a newer session of the same cloud has claimed the provider | `Unavailable` | `NotDone` |
//!
//! The next call after a lost connection dials again. `claim` answers only after the calls of older sessions have ended.

mod artifact;
mod block;
mod client;
mod frame;
mod gate;
mod host;
mod hypervisor;
mod meter;
mod network;
mod server;
mod stream;

pub use client::Remote;
pub use client::RemotePart;
pub use frame::FRAME_MAX;
pub use frame::decode;
pub use frame::encode;
pub use server::Served;
pub use server::Server;

use serde::Deserialize;
use serde::Serialize;

use crate::Error;
use crate::Id;
use crate::Result;
use crate::id::Fabric;
use crate::id::Pool;

/// The protocols that a side speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    oldest: u16,
    newest: u16,
}

impl Dialect {
    /// What this version speaks.
    pub const CURRENT: Self = Self { oldest: 1, newest: 1 };

    /// The next version, for the test that both get along: one verb and one field more.
    #[doc(hidden)]
    pub const NEXT: Self = Self { oldest: 1, newest: 2 };

    /// The newest protocol that both sides speak.
    fn common(self, (oldest, newest): (u16, u16)) -> Result<u16> {
        let common = self.newest.min(newest);
        if common >= self.oldest.max(oldest) {
            return Ok(common);
        }
        Err(Error::unsupported(format!(
            "one side speaks protocols {} to {}, the other {oldest} to {newest}",
            self.oldest, self.newest
        ))
        .remedy("upgrade the older side"))
    }
}

/// Which provider a call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Part {
    Inventory,
    Hypervisor,
    Images,
    Handovers,
    Artifacts,
    Access(Id<Pool>),
    Plugs,
    Power,
    Pool(Id<Pool>),
    Snapshots(Id<Pool>),
    Jobs(Id<Pool>),
    Network(Id<Fabric>),
    Meter,
}
