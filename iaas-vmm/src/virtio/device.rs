//! What a virtio device is to its transport.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use super::chain::Fault;

/// A virtio device without its transport: features, a configuration space, and work on queues.
///
/// # Contract
/// One thread at a time calls it. No call blocks, panics or allocates by what the guest says: a driver that breaks the
/// protocol is answered with a [`Fault`], after which the transport calls only [`abandon`](Self::abandon) and
/// [`reset`](Self::reset).
pub trait VirtioDevice: Debug + Send {
    /// The device's type.
    ///
    /// # Source
    /// virtio 1.2 §5.
    fn kind(&self) -> u32;

    /// The features that it offers, those of the transport and of the ring included.
    fn features(&self) -> u64;

    /// The most descriptors of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space as it is now.
    fn config(&self) -> Vec<u8>;

    /// A driver is ready, and has accepted `features`.
    fn activate(&mut self, features: u64);

    /// Takes what the driver offers and gives back what is done.
    ///
    /// # Errors
    /// [`Fault`]: the driver broke the protocol.
    fn serve(&mut self, queues: &mut [Queue], memory: &Arc<GuestMemoryMmap>) -> Result<Served, Fault>;

    /// Forgets what is not begun, takes back what is finished without telling the driver, and says how much is still
    /// under way in guest memory. The device is reset when that is nothing.
    fn abandon(&mut self) -> usize;

    /// Forgets the driver. Nothing is under way.
    fn reset(&mut self);

    /// Readable when [`serve`](Self::serve) may have something to do without the driver.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// What a device asks for after its turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Bit n: the driver must be told of queue n.
    pub notify: u64,
    /// When it wants its next turn, kicks of the driver aside.
    pub next: Next,
}

/// What a device waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Next {
    /// Its event.
    #[default]
    Event,
    /// Nothing: there is more to do.
    Now,
    /// A few milliseconds; its event says nothing now.
    Soon,
    /// A kick alone; its event says nothing now.
    Kick,
}
