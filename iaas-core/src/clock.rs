//! Time and randomness as an argument: the system's, or one that a test turns by hand.

use std::fmt::Debug;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;
use uuid::Uuid;

/// The source of time and of fresh ids.
#[async_trait]
pub trait Clock: Debug + Send + Sync + 'static {
    /// The wall clock, for records.
    fn now(&self) -> Timestamp;
    /// Time since some fixed moment of this process; never goes back. For leases and backoff.
    fn monotonic(&self) -> Duration;
    /// Returns after `span` of [`monotonic`](Self::monotonic) time.
    async fn sleep(&self, span: Duration);
    /// A fresh UUIDv7.
    fn uuid(&self) -> Uuid;
}

/// The system's clock. `sleep` needs a tokio runtime with time enabled.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// Starts the monotonic clock at zero.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
    async fn sleep(&self, span: Duration) {
        tokio::time::sleep(span).await;
    }
    fn uuid(&self) -> Uuid {
        Uuid::now_v7()
    }
}

/// A clock that stands still until it is advanced; its ids follow from its seed.
#[derive(Debug)]
pub struct ManualClock {
    start: Timestamp,
    elapsed: watch::Sender<Duration>,
    ids: Mutex<u64>,
}

impl ManualClock {
    /// A clock that shows `start`.
    pub fn at(start: Timestamp) -> Self {
        Self { start, elapsed: watch::Sender::new(Duration::ZERO), ids: Mutex::new(0) }
    }

    /// Moves the clock; sleepers whose time has come wake up.
    pub fn advance(&self, span: Duration) {
        self.elapsed.send_modify(|t| *t = t.saturating_add(span));
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        self.start.saturating_add(self.monotonic()).unwrap_or(self.start)
    }
    fn monotonic(&self) -> Duration {
        *self.elapsed.borrow()
    }
    async fn sleep(&self, span: Duration) {
        let until = self.monotonic().saturating_add(span);
        let mut elapsed = self.elapsed.subscribe();
        // The sender lives as long as `self`, so this ends only when the time has come.
        let _ = elapsed.wait_for(|t| *t >= until).await;
    }
    fn uuid(&self) -> Uuid {
        let mut next = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        *next += 1;
        let ms = u64::try_from(self.now().as_millisecond()).unwrap_or(0);
        // RFC 9562 §5.7: 48 bits of Unix milliseconds, then bits of our choice; a counter keeps them apart and in order.
        let mut tail = [0; 10];
        tail[2..].copy_from_slice(&next.to_be_bytes());
        uuid::Builder::from_unix_timestamp_millis(ms, &tail).into_uuid()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_a_manual_clock_are_distinct_ordered_and_repeatable() {
        let make = || ManualClock::at(Timestamp::UNIX_EPOCH);
        let (a, b) = (make(), make());
        let first: Vec<Uuid> = (0..3).map(|_| a.uuid()).collect();
        let again: Vec<Uuid> = (0..3).map(|_| b.uuid()).collect();
        assert_eq!(first, again);
        assert!(first.is_sorted());
        assert_eq!(first[0].get_version_num(), 7);
    }

    #[tokio::test]
    async fn a_sleeper_wakes_when_its_time_has_come() {
        let clock = ManualClock::at(Timestamp::UNIX_EPOCH);
        tokio::join!(clock.sleep(Duration::from_secs(5)), async { clock.advance(Duration::from_secs(5)) });
        assert_eq!(clock.now().as_second(), 5);
    }
}
