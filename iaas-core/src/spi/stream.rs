//! Streams that cross the SPI as handles: pulled items and bytes, with credit from the reader.

use async_trait::async_trait;
use bytes::Bytes;

use crate::Result;

/// A sequence that is pulled item by item, so the reader's pace is the writer's.
#[async_trait]
pub trait Pull<T>: Send {
    /// The next item; `None` at the end. Cancel-safe: a dropped future loses no item.
    async fn next(&mut self) -> Option<Result<T>>;
}

/// A boxed sequence of `T`.
pub type Feed<T> = Box<dyn Pull<T>>;

/// A two-way stream of bytes, as a console's.
#[async_trait]
pub trait ByteStream: Send {
    /// The next bytes; `None` when the other side has closed. Cancel-safe.
    async fn read(&mut self) -> Result<Option<Bytes>>;

    /// Sends `bytes`, all or an error.
    async fn write(&mut self, bytes: Bytes) -> Result<()>;

    /// Says that no more bytes follow, and waits until what was written has arrived.
    async fn close(&mut self) -> Result<()>;
}
