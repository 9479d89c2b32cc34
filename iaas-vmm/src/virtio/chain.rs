//! A descriptor chain, read to its end and split into what the device reads and what it writes.
//!
//! Drivers may cut their buffers where they like (virtio 1.2 §2.7.4), so a request is bytes, not descriptors.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::Address;
use vm_memory::Bytes;
use vm_memory::GuestMemory;
use vm_memory::GuestMemoryMmap;

use crate::memory::Span;

/// What a driver did that no driver may do. The device stops until it is reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault(pub String);

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the driver broke the virtio protocol: {}", self.0)
    }
}

impl std::error::Error for Fault {}

impl Fault {
    /// A ring that leads out of guest memory, or whose indices make no sense.
    pub(crate) fn ring(error: virtio_queue::Error) -> Self {
        Self(error.to_string())
    }
}

/// A whole chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The descriptor that the used ring names.
    pub head: u16,
    /// What the device reads.
    pub readable: Spans,
    /// What the device writes.
    pub writable: Spans,
}

impl Chain {
    /// Reads a chain of at most `most` descriptors.
    ///
    /// # Errors
    /// [`Fault`] for a chain that is empty, too long, broken off, endless, or has a readable part after a writable one.
    pub fn read<M>(chain: DescriptorChain<M>, most: usize) -> Result<Self, Fault>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let head = chain.head_index();
        let mut whole = Self { head, readable: Spans::default(), writable: Spans::default() };
        let mut last = None;
        for (count, part) in chain.enumerate() {
            if count >= most {
                return Err(Fault(format!("a chain of more than {most} descriptors")));
            }
            whole.take(&part)?;
            last = Some(part);
        }
        match last {
            // The iterator ends silently at a descriptor that it cannot follow; then the last one still points on.
            Some(part) if part.has_next() => Err(Fault("a chain that leads nowhere".into())),
            Some(_) => Ok(whole),
            None => Err(Fault("an empty chain".into())),
        }
    }

    fn take(&mut self, part: &Descriptor) -> Result<(), Fault> {
        let span = Span { at: part.addr(), len: part.len() };
        if part.is_write_only() {
            self.writable.0.push(span);
        } else if self.writable.0.is_empty() {
            self.readable.0.push(span);
        } else {
            // virtio 1.2 §2.7.4.2: readable parts come first.
            return Err(Fault("a readable descriptor after a writable one".into()));
        }
        Ok(())
    }
}

/// Stretches of guest memory that make one run of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans(pub Vec<Span>);

impl Spans {
    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|span| u64::from(span.len)).sum()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Cuts the first `count` bytes off, or `None` if there are fewer.
    pub fn split_front(&mut self, count: u64) -> Option<Self> {
        let rest = self.len().checked_sub(count)?;
        let back = self.split_back(rest)?;
        Some(std::mem::replace(self, back))
    }

    /// Cuts the last `count` bytes off, or `None` if there are fewer.
    pub fn split_back(&mut self, count: u64) -> Option<Self> {
        let mut left = self.len().checked_sub(count)?;
        let mut back = Vec::new();
        let mut front = Vec::with_capacity(self.0.len());
        for span in self.0.drain(..) {
            let here = u32::try_from(left.min(u64::from(span.len))).unwrap_or(span.len);
            left -= u64::from(here);
            if here > 0 {
                front.push(Span { at: span.at, len: here });
            }
            if here < span.len {
                let at = span.at.checked_add(u64::from(here));
                // An address beyond the end of the space is no memory; it is found out when the span is mapped.
                let at = at.unwrap_or(vm_memory::GuestAddress(u64::MAX));
                back.push(Span { at, len: span.len - here });
            }
        }
        self.0 = front;
        Some(Self(back))
    }

    /// Copies all bytes into `out`, which must be just as long.
    pub fn copy_to(&self, memory: &GuestMemoryMmap, out: &mut [u8]) -> Result<(), Fault> {
        let mut rest = out;
        for span in &self.0 {
            let len = usize::try_from(span.len).unwrap_or(usize::MAX).min(rest.len());
            let (here, after) = rest.split_at_mut(len);
            memory.read_slice(here, span.at).map_err(|_| outside(span))?;
            rest = after;
        }
        Ok(())
    }

    /// Copies `bytes` to the front.
    pub fn copy_from(&self, memory: &GuestMemoryMmap, bytes: &[u8]) -> Result<(), Fault> {
        let mut rest = bytes;
        for span in &self.0 {
            let len = usize::try_from(span.len).unwrap_or(usize::MAX).min(rest.len());
            let (here, after) = rest.split_at(len);
            memory.write_slice(here, span.at).map_err(|_| outside(span))?;
            rest = after;
        }
        Ok(())
    }
}

fn outside(span: &Span) -> Fault {
    Fault(format!("{} bytes at {:#x}, outside of guest memory", span.len, span.at.raw_value()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn bytes_are_cut_wherever_asked() {
        let span = |at, len| Span { at: GuestAddress(at), len };
        let mut all = Spans(vec![span(0x100, 10), span(0x200, 6), span(0x300, 1)]);
        assert_eq!(all.split_back(1).unwrap().0, [span(0x300, 1)]);
        assert_eq!(all.split_front(12).unwrap().0, [span(0x100, 10), span(0x200, 2)]);
        assert_eq!(all.0, [span(0x202, 4)]);
        assert_eq!(all.split_front(5), None);
        assert_eq!(all.len(), 4);
    }
}
