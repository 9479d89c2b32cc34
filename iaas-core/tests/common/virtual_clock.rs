//! A clock on the paused time of a tokio runtime: timers fire as soon as nothing else is left to do.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use iaas_core::Clock;
use jiff::Timestamp;
use tokio::time::Instant;
use uuid::Uuid;

/// Begins at 2026-01-01T00:00:00Z; its ids are numbers.
#[derive(Debug)]
pub struct VirtualClock {
    start: Instant,
    ids: AtomicU64,
}

impl VirtualClock {
    /// A clock of the current runtime, whose time must be paused.
    pub fn new() -> Self {
        Self { start: Instant::now(), ids: AtomicU64::new(0) }
    }
}

/// 2026-01-01T00:00:00Z, in seconds of Unix time.
pub const START: i64 = 1_767_225_600;

#[async_trait]
impl Clock for VirtualClock {
    fn now(&self) -> Timestamp {
        let start = Timestamp::from_second(START).unwrap();
        start.checked_add(self.monotonic()).unwrap()
    }
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
    async fn sleep(&self, span: Duration) {
        tokio::time::sleep(span).await;
    }
    fn uuid(&self) -> Uuid {
        let n = self.ids.fetch_add(1, Ordering::Relaxed);
        let ms = u64::try_from(self.now().as_millisecond()).unwrap();
        let mut random = [0; 10];
        // In front, so that ids of one millisecond are in order; and behind, where short names are taken from.
        random[..5].copy_from_slice(&n.to_be_bytes()[3..]);
        random[5..].copy_from_slice(&n.to_be_bytes()[3..]);
        uuid::Builder::from_unix_timestamp_millis(ms, &random).into_uuid()
    }
}

/// Runs `test` on a runtime of one thread whose time is virtual.
pub fn in_virtual_time<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(test)
}
