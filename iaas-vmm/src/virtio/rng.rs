//! virtio-rng: random bytes from a source of the host.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use iaas_core::Error;
use iaas_core::Result;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::Queue;
use virtio_queue::QueueOwnedT;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::chain::Chain;
use super::chain::Fault;
use super::device::Next;
use super::device::Served;
use super::device::VirtioDevice;

/// A source of randomness.
pub struct Rng {
    source: Box<dyn Read + Send>,
}

impl Rng {
    /// Takes its bytes from `source`, which must not block.
    pub fn new(source: impl Read + Send + 'static) -> Self {
        Self { source: Box::new(source) }
    }

    /// Takes its bytes from the kernel.
    ///
    /// # Errors
    /// `Unavailable`: there is no `/dev/urandom`.
    pub fn of_this_host() -> Result<Self> {
        let source = File::open("/dev/urandom");
        Ok(Self::new(source.map_err(|e| Error::unavailable("this host has no /dev/urandom").because(&e))?))
    }

    /// Fills the front of a chain; says with how many bytes.
    fn fill(&mut self, chain: &mut Chain, memory: &GuestMemoryMmap) -> Result<u32, Fault> {
        let mut bytes = [0; REQUEST_MAX];
        // A driver may ask for more; it gets what a request may cost.
        let want = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX).min(REQUEST_MAX);
        let room = bytes.get_mut(..want).unwrap_or_default();
        if let Err(error) = self.source.read_exact(room) {
            tracing::warn!(%error, "the source of randomness has none");
            return Ok(0);
        }
        let len = u64::try_from(want).unwrap_or(0);
        let front = chain.writable.split_front(len).unwrap_or_default();
        front.copy_from(memory, room)?;
        Ok(u32::try_from(want).unwrap_or(0))
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) {}

    fn serve(&mut self, queues: &mut [Queue], memory: &Arc<GuestMemoryMmap>) -> Result<Served, Fault> {
        let Some(queue) = queues.first_mut() else { return Ok(Served::default()) };
        let mut budget = queue.size();
        let mut used = false;
        loop {
            queue.disable_notification(&**memory).map_err(Fault::ring)?;
            while budget > 0
                && let Some(chain) = queue.iter(memory.clone()).map_err(Fault::ring)?.next()
            {
                let mut chain = Chain::read(chain, CHAIN_MAX)?;
                let len = self.fill(&mut chain, memory)?;
                queue.add_used(&**memory, chain.head, len).map_err(Fault::ring)?;
                (budget, used) = (budget - 1, true);
            }
            if budget == 0 || !queue.enable_notification(&**memory).map_err(Fault::ring)? {
                break;
            }
        }
        let notify = used && queue.needs_notification(&**memory).map_err(Fault::ring)?;
        let next = if budget == 0 { Next::Now } else { Next::Kick };
        Ok(Served { notify: u64::from(notify), next })
    }

    fn abandon(&mut self) -> usize {
        0
    }

    fn reset(&mut self) {}

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rng")
    }
}

const QUEUE_SIZE: u16 = 64;
const CHAIN_MAX: usize = 64;
/// The most bytes of one request.
const REQUEST_MAX: usize = 4096;
