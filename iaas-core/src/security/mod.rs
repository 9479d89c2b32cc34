//! Who may, and the proof of it: no permit, no effect.
//!
//! A [`Permit`] is made only by [`Gate::check`], names one action and owns its request. The engine takes permits, never
//! principals. [`rbac`] decides by roles, [`audit`] proves what was done.

pub mod actions;
pub mod audit;
pub mod gate;
pub mod permit;
pub mod rbac;

pub use actions::Action;
pub use gate::Entities;
pub use gate::Gate;
pub use permit::Permit;
