//! How long the guest was cut off: from the lines that it printed about itself, by its own clock.

use std::time::Duration;

use iaas_core::Error;
use iaas_core::Result;
use serde::Deserialize;
use serde::Serialize;

use crate::guest::Guest;
use crate::guest::number;

/// What a guest saw in a period of its own uptime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// The longest time between two replies to pings that leave every 20 ms, in milliseconds.
    pub gap_ms: f64,
    /// The longest time that a fresh TCP connection took, in milliseconds. A lost SYN costs a second.
    pub connect_ms: f64,
    /// Pages fetched.
    pub fetches: usize,
    /// Fetches that failed.
    pub failed: usize,
}

/// The guest's uptime in seconds, by its newest line that has one.
pub fn uptime(guest: &Guest) -> Option<f64> {
    guest.lines().iter().rev().find_map(|line| number(line, "uptime"))
}

/// Waits until the guest's own clock has passed `until`.
///
/// # Errors
/// `Timeout` if it prints nothing newer for a minute.
pub async fn reach(guest: &mut Guest, until: f64) -> Result<()> {
    let mut from = 0;
    loop {
        let (at, line) = guest.line_after(from, "TICK", Duration::from_secs(240)).await?;
        if number(&line, "uptime").is_some_and(|uptime| uptime >= until) {
            return Ok(());
        }
        from = at + 1;
    }
}

/// What the guest saw from uptime `from` until `to`.
///
/// # Errors
/// `Internal` if it printed nothing in that time: then nothing is known.
pub fn between(guest: &Guest, from: f64, to: f64) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut ticks = 0;
    for line in guest.lines() {
        let inside = number(&line, "uptime").is_some_and(|at| at >= from && at <= to);
        if inside && line.starts_with("TICK") {
            ticks += 1;
            seen.gap_ms = seen.gap_ms.max(number(&line, "max_gap_ms").unwrap_or(f64::MAX));
        } else if inside && line.starts_with("FETCH nonce") {
            seen.fetches += 1;
            seen.connect_ms = seen.connect_ms.max(number(&line, "connect_ms").unwrap_or(f64::MAX));
        } else if inside && line.starts_with("FETCH fail") {
            seen.failed += 1;
        }
    }
    if ticks == 0 || seen.fetches == 0 {
        return Err(Error::internal("the guest told nothing about this period"));
    }
    Ok(seen)
}
