//! What you may replace: one small object-safe trait per part of a cloud, each with a numbered contract.
//!
//! Every provider speaks the same four verbs of [`Converge`] for each kind of object that it makes, and everything that
//! crosses is a serde value, so a provider may stand in this process or on another host.
//!
//! Writing your own? Start from [`base`]: it keeps the clauses that all providers share.

pub mod artifact;
pub mod audit;
pub mod authorizer;
pub mod base;
pub mod block;
pub mod contract;
pub mod dataplane;
pub mod host;
pub mod hypervisor;
pub mod key;
pub mod meter;
pub mod network;
pub mod placement;
pub mod remote;
pub mod state_store;
pub mod stream;
pub mod target;

pub use contract::Call;
pub use contract::Cancel;
pub use contract::Converge;
pub use contract::Ctx;
pub use contract::Found;
pub use contract::Hello;
pub use contract::Kind;
pub use contract::Phase;
pub use contract::Provider;
pub use contract::Reading;
pub use contract::Seen;
pub use contract::Site;
pub use contract::Stamp;
pub use contract::Tag;
pub use contract::Value;
pub use stream::ByteStream;
pub use stream::Feed;
pub use stream::Pull;
