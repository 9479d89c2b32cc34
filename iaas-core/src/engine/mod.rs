//! How the cloud converges: intent first, then effects, then observation, and nothing else.
//!
//! A change is one commit of everything that it means ([`draft`], [`intent`]); then a keyed work [`queue`] drives each
//! record to what it wants ([`reconcile`]). Create, retry, resume after a crash and clean-up are the same path: undo is
//! delete. Capacity and quota are released only by the commit that deletes a record, after its objects were seen gone.

pub mod adopt;
pub mod audit;
pub mod codec;
pub mod commit;
pub mod draft;
pub mod driver;
pub mod explain;
pub mod intent;
pub mod outbox;
pub mod placement;
pub mod policy;
pub mod queue;
pub mod reconcile;
pub mod run;
pub mod sites;
pub mod state;
pub mod sweep;
pub mod tokens;

pub use draft::Plan;
pub use run::Engine;
pub use run::Options;
pub use tokens::Running;
