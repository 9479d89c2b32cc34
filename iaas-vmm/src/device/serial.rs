//! The serial port: a 16550 whose output goes into a [`Scrollback`], and whose input waits in a bounded queue.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

use crate::kvm::Bell;

/// The port.
pub(crate) struct Serial {
    port: vm_superio::Serial<Pin, NoEvents, Output>,
    typed: VecDeque<u8>,
}

impl Serial {
    /// A port that interrupts by `pin` and writes to `out`.
    pub(crate) fn new(pin: Bell, out: Arc<Scrollback>) -> Self {
        Self { port: vm_superio::Serial::new(Pin(pin), Output(out)), typed: VecDeque::new() }
    }

    /// Reads register `offset`.
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        let value = self.port.read(offset);
        self.feed();
        value
    }

    /// Writes register `offset`.
    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        // Neither the output, which is memory, nor the interrupt, whose counter is nowhere near its end, can fail.
        if let Err(error) = self.port.write(offset, value) {
            tracing::debug!(%error, "a byte of the serial port was lost");
        }
        self.feed();
    }

    /// Takes input; says how many bytes there was room for.
    pub(crate) fn type_in(&mut self, bytes: &[u8]) -> usize {
        let room = TYPED_MAX.saturating_sub(self.typed.len()).min(bytes.len());
        self.typed.extend(bytes.iter().take(room));
        self.feed();
        room
    }

    /// Moves input on to the port's own queue as far as that has room.
    fn feed(&mut self) {
        let count = self.port.fifo_capacity().min(self.typed.len());
        if count == 0 {
            return;
        }
        let bytes: Vec<u8> = self.typed.iter().take(count).copied().collect();
        // In loop-back mode the port takes nothing: the guest is testing it, and what was typed waits.
        match self.port.enqueue_raw_bytes(&bytes) {
            Ok(taken) => drop(self.typed.drain(..taken)),
            Err(error) => tracing::debug!(%error, "the serial port's input waits"),
        }
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("typed", &self.typed.len()).finish_non_exhaustive()
    }
}

struct Pin(Bell);

impl Trigger for Pin {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.ring()
    }
}

struct Output(Arc<Scrollback>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The last bytes that were written, numbered from the first one ever.
#[derive(Debug)]
pub(crate) struct Scrollback {
    ring: Mutex<Ring>,
    grown: Condvar,
    kept: usize,
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    total: u64,
    closed: bool,
}

impl Scrollback {
    /// Keeps `kept` bytes.
    pub(crate) fn new(kept: usize) -> Self {
        Self { ring: Mutex::default(), grown: Condvar::new(), kept }
    }

    fn append(&self, bytes: &[u8]) {
        let mut ring = self.lock();
        ring.bytes.extend(bytes);
        let surplus = ring.bytes.len().saturating_sub(self.kept);
        ring.bytes.drain(..surplus);
        ring.total += u64::try_from(bytes.len()).unwrap_or(0);
        self.grown.notify_all();
    }

    /// Nothing comes any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.grown.notify_all();
    }

    /// Bytes from number `from` on, or from the oldest kept, and the number behind the last; waits for `patience` for
    /// one if there is none.
    pub(crate) fn read(&self, from: u64, most: usize, patience: Duration) -> (Vec<u8>, u64) {
        let deadline = Instant::now() + patience;
        let mut ring = self.lock();
        while ring.total <= from && !ring.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            ring = self.grown.wait_timeout(ring, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let oldest = ring.total - u64::try_from(ring.bytes.len()).unwrap_or(0);
        let start = from.clamp(oldest, ring.total);
        let skip = usize::try_from(start - oldest).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = ring.bytes.iter().skip(skip).take(most).copied().collect();
        let next = start + u64::try_from(bytes.len()).unwrap_or(0);
        (bytes, next)
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of input that wait for the guest.
const TYPED_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> (Serial, Arc<Scrollback>, Bell) {
        let out = Arc::new(Scrollback::new(8));
        let pin = Bell::new().unwrap();
        (Serial::new(pin.try_clone().unwrap(), out.clone()), out, pin)
    }

    #[test]
    fn the_end_of_the_output_is_kept_and_numbered() {
        let (mut serial, out, _) = port();
        b"0123456789".iter().for_each(|byte| serial.write(0, *byte));
        let now = Duration::ZERO;
        assert_eq!(out.read(0, 99, now), (b"23456789".to_vec(), 10));
        assert_eq!(out.read(7, 2, now), (b"78".to_vec(), 9));
        assert_eq!(out.read(99, 2, now), (vec![], 10));
    }

    #[test]
    fn input_waits_for_the_guest_and_is_bounded() {
        let (mut serial, _, pin) = port();
        serial.write(1, 1);
        assert_eq!(serial.type_in(&[b'x'; 5000]), 4096);
        assert!(pin.silence());
        let mut count = 0;
        while serial.read(5) & 1 != 0 {
            assert_eq!(serial.read(0), b'x');
            count += 1;
        }
        assert_eq!(count, 4096);
    }
}
