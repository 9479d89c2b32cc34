//! Chains and rings by themselves: what our reader of chains says is what the specification says, and a device that is given
//! a ring without the transport's checks, as over vhost-user, comes back.

use std::sync::Arc;

use virtio_queue::Queue;
use virtio_queue::QueueOwnedT;
use virtio_queue::QueueT;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::Input;
use super::block::Disk;
use super::guest;
use super::walk;
use super::walk::Walk;
use crate::memory::Span;
use crate::virtio::block::Block;
use crate::virtio::chain::Chain;
use crate::virtio::chain::Spans;

/// A ring anywhere in memory, whose chains are read twice: by the device's reader and by the judge's.
pub fn chain(input: &[u8]) {
    let mut input = Input(input);
    let memory = guest::memory();
    let size = 1u16 << input.below(9);
    let most = [4, 64, 132][input.below(3)];
    let mut queue = Queue::new(256).unwrap();
    queue.set_size(size);
    let [table, avail, used] = [16, 2, 4].map(|unit| guest::address(&mut input) / unit * unit);
    queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
    queue.set_event_idx(input.byte() & 1 != 0);
    queue.set_ready(true);
    // Descriptors at the table, heads in the ring, and whatever else is to be found somewhere.
    for _ in 0..input.below(40) {
        guest::put_descriptor(&memory, table, input.byte().into(), &mut input);
    }
    let heads = input.below(20);
    for n in 0..heads {
        let place = avail.saturating_add(4 + u64::try_from(n).unwrap() * 2);
        let _ = memory.write_obj(u16::from(input.byte()), GuestAddress(place));
    }
    let _ = memory.write_obj(u16::try_from(heads).unwrap(), GuestAddress(avail.saturating_add(2)));
    for _ in 0..input.below(8) {
        let at = guest::address(&mut input);
        let count = input.below(64);
        let _ = memory.write_slice(input.take(count), GuestAddress(at));
    }
    compare(&memory, &mut queue, most);
    queue.set_next_avail(0);
    serve(&memory, &mut queue, &mut input);
}

fn compare(memory: &Arc<GuestMemoryMmap>, queue: &mut Queue, most: usize) {
    let (table, size) = (queue.desc_table(), queue.size());
    let Ok(chains) = queue.iter(memory.clone()) else { return };
    for chain in chains.take(size.into()) {
        let head = chain.head_index();
        let read = Chain::read(chain, most).ok();
        let judged = walk::walk(memory, table, size, head).filter(|walk| walk.parts() <= most);
        let plain = read.clone().map(|chain| Walk {
            head: chain.head,
            readable: pairs(&chain.readable),
            writable: pairs(&chain.writable),
            read_from: judged.as_ref().map(|walk| walk.read_from.clone()).unwrap_or_default(),
        });
        assert_eq!(plain, judged, "a chain is read otherwise than the specification says");
        if let Some(chain) = read {
            [chain.readable, chain.writable].iter().for_each(|spans| cut(memory, spans));
        }
    }
}

fn pairs(spans: &Spans) -> Vec<(u64, u32)> {
    spans.0.iter().map(|span| (span.at.0, span.len)).collect()
}

/// Cutting loses no byte and moves none.
fn cut(memory: &GuestMemoryMmap, spans: &Spans) {
    let whole = flat(spans);
    for count in [0, 1, 16, spans.len() / 2, spans.len()] {
        let (mut front, mut back) = (spans.clone(), spans.clone());
        let (Some(head), Some(tail)) = (front.split_front(count), back.split_back(count)) else {
            assert!(count > spans.len());
            continue;
        };
        assert_eq!((head.len(), tail.len()), (count, count));
        if let Some(whole) = &whole {
            let glued = |a: &Spans, b: &Spans| [flat(a).unwrap(), flat(b).unwrap()].concat();
            assert_eq!(glued(&head, &front), *whole);
            assert_eq!(glued(&back, &tail), *whole);
        }
    }
    let mut ours = vec![0; usize::try_from(spans.len().min(0x4000)).unwrap()];
    let mut theirs = ours.clone();
    if spans.copy_to(memory, &mut ours).is_ok() {
        assert!(walk::copy(memory, &pairs(spans), &mut theirs));
        assert_eq!(ours, theirs);
    }
}

/// The address of every byte, of spans that are short enough to write them down.
fn flat(spans: &Spans) -> Option<Vec<u64>> {
    let each = |span: &Span| (0..u64::from(span.len)).map(|n| span.at.0.checked_add(n)).collect::<Vec<_>>();
    (spans.len() < 2048)
        .then(|| spans.0.iter().flat_map(each).collect())
        .and_then(|all: Vec<_>| all.into_iter().collect())
}

/// A disk on a ring that nobody has checked: it answers or fails, and either way lets go of everything.
fn serve(memory: &Arc<GuestMemoryMmap>, queue: &mut Queue, input: &mut Input<'_>) {
    let disk = Disk::new(input);
    disk.permit_all();
    let mut device = Block::new(&disk, "serial", disk.depth()).unwrap();
    for _ in 0..4 {
        if device.serve(queue, memory).is_err() {
            break;
        }
        disk.finish_all();
    }
    for _ in 0..3 {
        disk.finish_all();
        device.abandon();
    }
    assert_eq!(device.outstanding(), 0, "a disk that waits for what has come back");
    device.reset();
}
