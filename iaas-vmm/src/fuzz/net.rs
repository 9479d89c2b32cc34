//! A NIC: a driver's buffers, frames and rings against a port that has frames, and room for them, as the input says.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::Mutex;

use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use nix::sys::eventfd::EventFd;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_CSUM;
use vm_memory::GuestMemoryMmap;

use super::Input;
use super::guest::Guest;
use super::guest::Subject;
use super::guest::lock;
use super::guest::run;
use super::guest::spans;
use super::walk;
use super::walk::Walk;
use crate::virtio::net::Net;

/// A driver of a NIC.
pub fn net(input: &[u8]) {
    let mut input = Input(input);
    let how = input.byte();
    let state = State { room: usize::MAX, inbox: VecDeque::new(), checksum: how & 1 == 0 };
    let mut wire = Wire(Arc::new(Mutex::new(state)));
    let port = Port(wire.clone(), EventFd::new().unwrap());
    run(Guest::new(Box::new(Net::new(Box::new(port), [2, 0, 0, 0, 0, 1]))), &mut wire, &mut input);
}

#[derive(Clone, Debug)]
struct Wire(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Frames that the port still takes.
    room: usize,
    inbox: VecDeque<Vec<u8>>,
    checksum: bool,
}

impl Subject for Wire {
    fn request(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        let how = input.byte();
        if how & 1 == 0 {
            // Room for a frame.
            let all: Vec<_> = spans(input, 3).into_iter().map(|(at, len)| (at, len, true)).collect();
            return guest.offer(0, &all, how >> 1);
        }
        let mut header = [0; VNET_HEADER];
        if how & 0x30 == 0x30 {
            header = input.array();
        }
        let mut all = vec![(guest.header(&header), 12, false)];
        all.extend(spans(input, 3).into_iter().map(|(at, len)| (at, len & 0xfff, false)));
        guest.offer(1, &all, how >> 1);
    }

    fn event(&mut self, input: &mut Input<'_>) {
        let mut state = lock(&self.0);
        match input.below(4) {
            0 => state.room = input.below(40),
            1 => state.room = usize::MAX,
            _ => {
                let mut frame = input.array::<VNET_HEADER>().to_vec();
                // What a switch may say of a frame: whether its checksum is to be filled in, and where.
                frame[0] &= 1;
                frame[1] = 0;
                frame.resize(VNET_HEADER + usize::from(input.word() & 0x7ff), input.byte());
                state.inbox.push_back(frame);
            }
        }
    }

    fn finish_all(&mut self) {}

    fn judge(&self, queue: usize, chain: &Walk, memory: &GuestMemoryMmap, features: u64) -> Option<bool> {
        if chain.parts() > 64 {
            return Some(false);
        }
        if queue == 0 {
            let fits = walk::length(&chain.writable) >= u64::try_from(VNET_HEADER).unwrap();
            return Some(fits && walk::is_memory(memory, &chain.writable));
        }
        let len = walk::length(&chain.readable);
        if !(13..=12 + 65_550).contains(&len) || !walk::is_memory(memory, &chain.readable) {
            return Some(false);
        }
        let mut header = [0; 2];
        walk::copy(memory, &chain.readable, &mut header);
        let agreed = u8::from(features & 1 << VIRTIO_NET_F_CSUM != 0);
        Some(header[0] & !agreed == 0 && header[1] == 0)
    }

    fn taken_at_once(&self) -> usize {
        32
    }
}

#[derive(Debug)]
struct Port(Wire, EventFd);

impl FramePort for Port {
    fn offloads(&mut self, want: Offloads) -> Offloads {
        Offloads { checksum: want.checksum && lock(&self.0.0).checksum, ..Offloads::default() }
    }

    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let mut state = lock(&self.0.0);
        let mut count = 0;
        for (buffers, len) in into.iter_mut().zip(lens) {
            while state.inbox.front().is_some_and(|frame| frame.len() > buffers.len()) {
                state.inbox.pop_front();
            }
            let Some(frame) = state.inbox.pop_front() else { break };
            *len = u32::try_from(buffers.write_at(0, &frame)).unwrap();
            count += 1;
        }
        if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }

    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        let mut state = lock(&self.0.0);
        assert!(!frames.is_empty() && frames.len() <= 32, "{} frames at a time", frames.len());
        for frame in frames {
            assert!((13..=12 + 65_550).contains(&frame.len()), "a frame of {} bytes", frame.len());
            let mut bytes = vec![0; frame.len()];
            assert_eq!(frame.read_at(0, &mut bytes), bytes.len());
            assert!(bytes[0] & !u8::from(state.checksum) == 0 && bytes[1] == 0, "offloads without agreement");
        }
        let count = frames.len().min(state.room);
        state.room = state.room.saturating_sub(if state.room == usize::MAX { 0 } else { count });
        if count == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
}
