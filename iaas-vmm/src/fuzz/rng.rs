//! Randomness: a driver's buffers and rings.

use vm_memory::GuestMemoryMmap;

use super::Input;
use super::guest::Guest;
use super::guest::Subject;
use super::guest::run;
use super::walk;
use super::walk::Walk;
use crate::virtio::rng::Rng;

/// A driver of the source of randomness.
pub fn rng(input: &[u8]) {
    let mut input = Input(input);
    let guest = Guest::new(Box::new(Rng::new(std::io::repeat(0xe5))));
    run(guest, &mut Source, &mut input);
}

struct Source;

impl Subject for Source {
    fn request(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        let spans = super::guest::spans(input, 3);
        let spans: Vec<_> = spans.into_iter().map(|(at, len)| (at, len, true)).collect();
        guest.offer(0, &spans, input.byte());
    }

    fn event(&mut self, _: &mut Input<'_>) {}

    fn finish_all(&mut self) {}

    fn judge(&self, _: usize, chain: &Walk, memory: &GuestMemoryMmap, _: u64) -> Option<bool> {
        // What is asked for beyond one answer is left alone, memory or not.
        let short = walk::length(&chain.writable) <= 4096;
        (chain.parts() <= 64 && short).then(|| walk::is_memory(memory, &chain.writable))
    }

    fn taken_at_once(&self) -> usize {
        64
    }
}
