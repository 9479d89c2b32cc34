//! A guest's console: what was printed is kept, up to a limit, and read from any offset.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::world::World;
use super::world::lock;
use crate::Result;
use crate::spi::ByteStream;

/// The bytes that are kept.
const KEPT: usize = 64 << 10;
/// How often a reader looks whether the clock has brought its guest further.
const LOOK: Duration = Duration::from_millis(20);

/// What a guest has printed.
#[derive(Debug)]
pub(super) struct Console {
    kept: Mutex<Kept>,
    end: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: VecDeque<u8>,
    /// The offset after the last byte.
    end: u64,
    closed: bool,
}

impl Default for Console {
    fn default() -> Self {
        Self { kept: Mutex::default(), end: watch::Sender::new(0) }
    }
}

impl Console {
    pub(super) fn print(&self, text: &[u8]) {
        let mut kept = lock(&self.kept);
        kept.bytes.extend(text);
        kept.end += text.len() as u64;
        let excess = kept.bytes.len().saturating_sub(KEPT);
        kept.bytes.drain(..excess);
        self.end.send_replace(kept.end);
    }

    pub(super) fn close(&self) {
        lock(&self.kept).closed = true;
        self.end.send_modify(|_| {});
    }

    /// Up to 4 KiB from `from` on, and the offset of the first of them.
    fn read(&self, from: u64) -> (u64, Vec<u8>, bool) {
        let kept = lock(&self.kept);
        let first = kept.end - kept.bytes.len() as u64;
        let at = from.clamp(first, kept.end);
        let skip = usize::try_from(at - first).unwrap_or(usize::MAX);
        (at, kept.bytes.iter().skip(skip).take(4096).copied().collect(), kept.closed)
    }
}

/// A console, opened.
pub(super) struct Reader<F> {
    pub(super) world: World,
    pub(super) console: Arc<Console>,
    pub(super) at: u64,
    /// Lets the clock act on the guest.
    pub(super) look: F,
}

#[async_trait]
impl<F: FnMut() + Send> ByteStream for Reader<F> {
    async fn read(&mut self) -> Result<Option<Bytes>> {
        let mut end = self.console.end.subscribe();
        loop {
            self.world.alive().await;
            (self.look)();
            let (at, bytes, closed) = self.console.read(self.at);
            if !bytes.is_empty() {
                self.at = at + bytes.len() as u64;
                return Ok(Some(bytes.into()));
            }
            if closed {
                return Ok(None);
            }
            tokio::select! {
                _ = end.changed() => {}
                () = self.world.clock().sleep(LOOK) => {}
            }
        }
    }

    async fn write(&mut self, bytes: Bytes) -> Result<()> {
        // The terminal's echo.
        self.console.print(&bytes);
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
