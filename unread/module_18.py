def function_18(x):
    return x + 18
def function_18(x):
    return x + 18
def function_18(x):
    return x + 18
def function_18(x):
    return x + 18
def function_18(x):
    return x + 18
