//! A whole cloud inside your own process: the model, the provider traits and the control plane.
//!
//! # Core concepts
//! * [`model`]: what exists. A [`Record`](model::Record) has the user's wish (`spec`), our decisions (`bind`) and what was
//!   observed (`status`).
//! * [`spi`]: what you may replace. Small object-safe traits with numbered contracts.
//! * [`store`]: where state is kept: in memory, or in one file.
//! * [`process`]: how the processes of a host start, outlive the control plane and are found again.
//! * [`testing`]: an in-memory fake for each trait, and the conformance suites (feature `conformance`).
//!
//! # Features
//! | feature | adds | pulls in | default |
//! |---|---|---|---|
//! | `redb` | the embedded durable state store | `redb` | yes |
//! | `conformance` | the public conformance suites and their saboteurs | nothing | no |

pub mod clock;
pub mod cloud;
pub mod engine;
pub mod error;
pub mod id;
pub mod model;
pub mod process;
pub mod security;
pub mod spi;
pub mod store;
pub mod testing;
pub mod unit;

pub use clock::Clock;
pub use clock::ManualClock;
pub use clock::SystemClock;
pub use cloud::Cloud;
pub use error::Error;
pub use error::ErrorKind;
pub use error::Outcome;
pub use error::Result;
pub use id::Boot;
pub use id::Entity;
pub use id::Epoch;
pub use id::Id;
pub use id::ObjectRef;
pub use id::Rev;
pub use id::Term;
pub use unit::ByteSize;
pub use unit::Cidr;
pub use unit::Digest;
pub use unit::Labels;
pub use unit::Mac;
pub use unit::Name;
pub use unit::PortRange;
