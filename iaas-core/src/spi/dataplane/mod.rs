//! The seams that bytes and frames cross: synchronous, without allocation per operation, inside one process.

pub(crate) mod at_once;
pub mod block;
pub mod buffer;
pub mod frame;
pub mod opener;

pub use block::BlockDevice;
pub use block::BlockDone;
pub use block::BlockOp;
pub use block::BlockQueue;
pub use block::Geometry;
pub use buffer::IoBuffers;
pub use frame::FramePort;
pub use frame::Offloads;
pub use opener::BlockOpener;
pub use opener::Env;
pub use opener::Grant;
pub use opener::Key;
pub use opener::Needs;
pub use opener::PortOpener;
