// How the tests' C++ functions are called from Python: no exception crosses, its text is returned instead.
#pragma once

#include <exception>
#include <string>

#define PYREG_EXPORT extern "C" __attribute__((visibility("default")))

inline std::string last_error;

// Returns null, or the text of the exception that `function` threw.
template <typename Function>
const char* error_of(Function&& function) {
  try {
    function();
  } catch (const std::exception& exception) {
    last_error = exception.what();
    return last_error.c_str();
  }
  return nullptr;
}
